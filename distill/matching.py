"""Distribution matching: re-noise the student's sample and move it along the difference of two predictions.

A sample at level ``s`` is re-noised to ``t > s`` by the bridge. A *direction* is where the sample should move (teacher
minus fake, in x0). A surrogate loss turns a direction into a loss whose gradient is minus that direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.transfer import like
from fewstep.distill.update import StudentSample
from fewstep.models.denoiser import expand_like
from fewstep.models.schedules import NoiseSchedule, bridge


def renoise(schedule: NoiseSchedule, sample: StudentSample, t: Tensor, random: KeyedRandom) -> tuple[Tensor, Tensor]:
    """``x_t = scale x_s + std n`` at times ``t`` [B], and the noise ``n``; both shaped like x_s."""
    scale, std = bridge(schedule, sample.level, t)
    x, n = sample.x, random.normal(sample.x.shape, "bridge")
    scale, std = like(x, expand_like(scale, x), expand_like(std, x))
    return scale * x + std * n, n


def per_sample_mean(x: Tensor) -> Tensor:
    """The mean over all axes but the batch axis, shaped [B, 1, ...] so that it multiplies ``x``."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def l1_weight(x: Tensor, reference: Tensor, floor: float = 1e-6) -> Tensor:
    """DMD's normaliser (arXiv 2311.18828, eq. 8): ``1 / mean |x - reference|`` per sample, detached, [B, 1, ...]."""
    return 1 / per_sample_mean((x.detach() - reference.detach()).float().abs()).clamp_min(floor)


def surrogate_loss(x: Tensor, direction: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """``1/2 mean (x - sg(x + w d))^2``: its gradient at ``x`` is ``-w d / numel``, its value ``1/2 mean (w d)^2``."""
    target = (x + weight * direction).detach()
    return 0.5 * (x - target).square().mean()


def huber_surrogate_loss(x: Tensor, direction: Tensor, weight: Tensor | float = 1.0, c: float = 1e-3) -> Tensor:
    """The same with a pseudo-Huber distance, as in TDM's code: ``mean w (sqrt((x - sg(x + d))^2 + c^2) - c)``.

    It is elementwise, so its gradient ``-w d / sqrt(d^2 + c^2) / numel`` is bounded by ``w / numel``.
    """
    target = (x + direction).detach()
    return (weight * (torch.sqrt((x - target).square() + c * c) - c)).mean()
