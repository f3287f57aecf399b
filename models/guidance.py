"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as ``null + w (cond - null)``; w = 1 is off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, batch_times
from fewstep.models.prediction import Prediction


@dataclass(frozen=True)
class Guidance:
    """The guidance ``scale`` w; below 0 it points away from the condition (SiD's anti-guidance). The model's
    ``GuidanceStyle`` defines how it is applied."""

    scale: float = 1.0


UNGUIDED = Guidance()


class Guided(NamedTuple):
    """A guided prediction ``out`` and its parts; without guidance ``null`` is None and ``out`` is ``cond``."""

    cond: Prediction
    null: Prediction | None
    out: Prediction

    @property
    def unconditional(self) -> Prediction:
        """The unconditional prediction. Raises ``ValueError`` if guidance was off, so that it was not computed."""
        if self.null is None:
            raise ValueError("guidance was off, so there is no unconditional prediction")
        return self.null


def guide(
    denoiser: Denoiser, x_t: Tensor, t: Tensor | float, condition: Condition, guidance: Guidance = UNGUIDED, *,
    null_graph: bool = True,
) -> Guided:  # fmt: skip
    """Evaluates ``denoiser`` at ``x_t`` [B, ...] with guidance, both branches in one batch of 2B; without
    ``null_graph`` one after the other, so that a graph holds the conditional one alone. A model with embedded guidance
    is evaluated once, whatever the scale, and its ``out`` is its ``cond``."""
    if denoiser.style.embedded:
        scale = torch.full((x_t.shape[0],), guidance.scale, device=x_t.device)
        condition = condition.replace(guidance=scale)
    if guidance.scale == 1.0 or denoiser.style.embedded:
        cond = denoiser(x_t, t, condition)
        return Guided(cond, None, cond)
    if null_graph:
        times = batch_times(t, x_t)
        both = denoiser(torch.cat([x_t, x_t]), torch.cat([times, times]), Condition.cat(condition, condition.null()))
        cond, null = both.split(x_t.shape[0])
    else:
        cond = denoiser(x_t, t, condition)
        with torch.no_grad():
            null = denoiser(x_t, t, condition.null())
    null = replace(null, coefficients=cond.coefficients)  # equal ones, copied to the device once
    out = cond.with_raw(null.raw + guidance.scale * (cond.raw - null.raw))
    if denoiser.style.postprocess is not None:
        out = out.with_raw(denoiser.style.postprocess(cond.raw, out.raw))
    return Guided(cond, null, out)
