"""Self-consistency of a student's steps: one long step should end where two shorter ones do (Salt, arXiv 2604.03118).

Distribution matching makes each step end in the right distribution, but nothing makes the student's steps compose. From
the state x_s in which it was evaluated, at t_s, its prediction leads straight to y_1 at an earlier time t_e of
sampling, and by a second evaluation at t_m in between to y_2:

    weight * (1 - t_s) * mean |y_1 - sg(y_2)|^2

The student trains on a finer grid than it samples with, whose times are t_s and t_m. Equations and the factor 1 - t_s,
which the paper does not mention, are those of the released code; its rollouts of mixed lengths and its matching of
features of videos are not here. By itself the term has trivial minima, such as any constant velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.transfer import like
from fewstep.distill.rollouts import add_noise
from fewstep.distill.stage import MAX_WEIGHT, BaseConfig
from fewstep.distill.update import MicroBatch
from fewstep.models.denoiser import expand_like
from fewstep.models.schedules import NoiseSchedule


class SelfConsistency(BaseConfig):
    """The ``weight`` of the term, and the number of training steps in a step of sampling, ``substeps``."""

    weight: float = Field(0.2, ge=0, le=MAX_WEIGHT)
    substeps: int = Field(2, ge=2, le=1000)


class Interval(NamedTuple):
    """Times [B] for a second step; ``valid`` [B] is False where the last training step leaves no room for one."""

    t_m: Tensor
    t_e: Tensor
    valid: Tensor


def choose_interval(random: KeyedRandom, t_s: Tensor, times: Sequence[float], substeps: int) -> Interval:
    """Random times t_e < t_m < t_s for ``t_s`` [B] of a decreasing training grid. t_e is 0 or a time of sampling (every
    ``substeps``-th of ``times``): one of the two that follow the successor of t_s; t_m is any time in between."""
    grid, n = torch.tensor([*times, 0.0], dtype=torch.float64), len(times)
    j = (grid == t_s[:, None]).int().argmax(1)
    nearest = ((j + 1) // substeps + 1) * substeps
    further = nearest + substeps * random.integers(len(j), 2, "self_consistency/end")
    e = torch.where(further <= n, further, nearest).clamp(max=n)
    between = (random.uniform(len(j), stream="self_consistency/middle") * (e - j - 1)).long()
    return Interval(grid[(j + 1 + between).clamp(max=n - 1)], grid[e], nearest <= n)


def step(schedule: NoiseSchedule, x: Tensor, x0: Tensor, now: Tensor, end: Tensor) -> Tensor:
    """The state at times ``end`` [B] to which a prediction ``x0`` at ``x`` and times ``now`` [B] leads."""
    alpha, sigma = like(x, *(of(expand_like(now, x)) for of in (schedule.alpha, schedule.sigma)))
    return add_noise(schedule, x0, (x - alpha * x0) / sigma, end)


def self_consistency_loss(
    micro: MicroBatch, schedule: NoiseSchedule, times: Sequence[float], config: SelfConsistency
) -> Tensor:
    """The term for the micro-batch's sample, whose rollout followed the training grid ``times`` (without the 0 at its
    end); gradients reach the sample's output."""
    sample = micro.sample
    assert sample.last is not None
    (x_s, evaluate), x0, t_s = sample.last, sample.output, sample.t_student
    t_m, t_e, valid = choose_interval(micro.random, t_s, times, config.substeps)
    y_1 = step(schedule, x_s, x0, t_s, t_e)
    with torch.no_grad():
        x_m = step(schedule, x_s, x0, t_s, t_m)
        y_2 = step(schedule, x_m, evaluate(x_m, t_m), t_m, t_e)
    (weight,) = like(x0, torch.where(valid, config.weight * (1 - t_s), 0.0))
    return (weight * (y_1 - y_2).float().square().flatten(1).mean(1)).mean()
