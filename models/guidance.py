"""Classifier-free guidance (Ho & Salimans, 2207.12598), in one convention: ``null + w (cond - null)``; 1 is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, batch_times, expand_like
from fewstep.models.prediction import Prediction


@dataclass(frozen=True)
class Guidance:
    """``scale`` w (below 0 pushes away from the condition: SiD's anti-guidance), used for times within ``interval``
    (Kynkäänniemi et al., 2404.07724). ``rescale`` in [0, 1] moves the standard deviation of the result back to the
    conditional one's (Lin et al., 2305.08891). How the
    scale is applied is the model's own ``GuidanceStyle``."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0


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
    out = combine(cond, null, times, guidance)
    if denoiser.style.finish is not None:
        out = out.with_raw(denoiser.style.finish(cond.raw, out.raw))
    return Guided(cond, null, out)


def combine(cond: Prediction, null: Prediction, t: Tensor, guidance: Guidance) -> Prediction:
    """The guided prediction from its two parts at times ``t`` (see ``Guidance``)."""
    low, high = guidance.interval
    inside = (t >= low) & (t <= high)
    scale = expand_like(torch.where(inside, guidance.scale, 1.0), cond.raw).to(cond.raw)
    raw = null.raw + scale * (cond.raw - null.raw)
    if guidance.rescale:
        axes = tuple(range(1, raw.ndim))
        matched = raw * (cond.raw.std(axes, keepdim=True) / raw.std(axes, keepdim=True))
        raw = torch.lerp(raw, matched, guidance.rescale)
    return cond.with_raw(raw)
