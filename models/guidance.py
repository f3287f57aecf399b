"""Classifier-free guidance (Ho & Salimans, 2207.12598), in one convention: ``null + w (cond - null)``; 1 is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, batch_times
from fewstep.models.prediction import Prediction


@dataclass(frozen=True)
class Guidance:
    """``scale`` w; below 0 pushes away from the condition (SiD's anti-guidance). How the scale is applied is the model's
    own ``GuidanceStyle``."""

    scale: float = 1.0


OFF = Guidance()


class Guided(NamedTuple):
    """A read and its parts; without guidance ``null`` is None and ``out`` is ``cond``."""

    cond: Prediction
    null: Prediction | None
    out: Prediction

    @property
    def unconditional(self) -> Prediction:
        """The null branch of a guided read; raises ``ValueError`` where guidance was off and it does not exist."""
        if self.null is None:
            raise ValueError("this read was not guided, so it has no unconditional part")
        return self.null


def guide(denoiser: Denoiser, x_t: Tensor, t: Tensor | float, condition: Condition, guidance: Guidance = OFF) -> Guided:
    """Reads ``denoiser`` at ``x_t`` [B, ...] with guidance; both branches go through it as one batch of 2B. A model
    that embeds guidance is read once, off or not, and its ``out`` is its ``cond``."""
    if denoiser.style.embedded:
        scale = torch.full((x_t.shape[0],), guidance.scale, device=x_t.device)
        condition = condition.replace(guidance=scale)
    if guidance.scale == 1.0 or denoiser.style.embedded:
        cond = denoiser(x_t, t, condition)
        return Guided(cond, None, cond)
    times = batch_times(t, x_t)
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([times, times]), Condition.cat(condition, condition.null()))
    cond, null = both.split(x_t.shape[0])
    out = cond.with_raw(null.raw + guidance.scale * (cond.raw - null.raw))
    if denoiser.style.finish is not None:
        out = out.with_raw(denoiser.style.finish(cond.raw, out.raw))
    return Guided(cond, null, out)
