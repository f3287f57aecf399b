"""How the student's state arises, and where gradient is kept: only in the student's last evaluation.

A rollout starts from pure noise at ``times[0]`` and walks down the student's own times. It returns an ``StudentSample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.distill.roles import Roles
from fewstep.distill.update import MicroBatch, StudentSample
from fewstep.models.denoiser import expand_like
from fewstep.models.schedules import NoiseSchedule


def start(micro: MicroBatch, schedule: NoiseSchedule, time: float) -> Tensor:
    """The noise of ``time`` [B, ...]: what the schedule leaves of an image there is taken as nothing."""
    return micro.random.normal((micro.batch.size, *micro.batch.shape), "start") * float(
        schedule.sigma(torch.tensor(time, dtype=torch.float64))
    )


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``alpha(t) x0 + sigma(t) noise`` for times [B]."""
    times = expand_like(t, x0)
    return schedule.alpha(times).to(x0) * x0 + schedule.sigma(times).to(x0) * noise


def backward_simulation(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """Backward simulation of DMD2 (arXiv 2405.14867, section 4.5): predict x0, noise it to the next time, and so on.

    The exit step is drawn once for the whole step and all processes; the sample is the x0 predicted there (s = 0). With
    a single time this is the one-step student.
    """
    schedule = roles.denoiser("student").schedule
    condition = micro.batch.condition
    last = int(micro.random.shared.integers(1, len(times), "exit"))
    x = start(micro, schedule, times[0])
    with torch.no_grad():
        for now, after in pairwise(times[: last + 1]):
            x0 = roles.predict("student", x, now, condition).out.x0
            x = add_noise(
                schedule, x0, micro.random.normal(x.shape, "renoise"), torch.full((len(x),), after, dtype=torch.float64)
            )
    x0 = roles.predict("student", x, times[last], condition).out.x0
    t_student = torch.full((len(x),), times[last], dtype=torch.float64)
    return StudentSample(x0, torch.zeros_like(t_student), x0, t_student, condition)


def segment_rollout(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """The student's deterministic trajectory, left at the end of one of its steps (TDM, arXiv 2503.06674, section 3).

    Each sample has its own segment; they are dealt out in turn from a shared random start, so that every shard makes
    the same number of evaluations. The anchor is the state x_s at the segment's end, pulled at the x0 it came from.
    """
    schedule = roles.denoiser("student").schedule
    condition = micro.batch.condition
    x = start(micro, schedule, times[0])
    segment = (torch.arange(len(x)) + micro.random.shared.integers(1, len(times), "segment")) % len(times)
    nodes = torch.tensor([*times, 0.0], dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(times) - 1):
            rows = (segment > i).nonzero()[:, 0].to(x.device)
            if len(rows):
                p = roles.predict("student", x[rows], times[i], condition.index(rows)).out
                x[rows] = add_noise(schedule, p.x0, p.noise, nodes[i + 1].expand(len(rows)))
    t_student, s = nodes[segment], nodes[segment + 1]
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(add_noise(schedule, p.x0, p.noise, s), s, p.x0, t_student, condition)


def random_time_rollout(micro: MicroBatch, roles: Roles, max_steps: int, inner: tuple[float, float]) -> StudentSample:
    """A deterministic trajectory over random times, left at a random one (CDM, arXiv 2605.06376).

    N in 1..max_steps is drawn once for all processes; each sample has its own N - 1 times in ``inner`` below 1, and its
    own one of the N states. The anchor is the x0 predicted there (s = 0), with the noise that the prediction implies.
    """
    schedule = roles.denoiser("student").schedule
    condition, size = micro.batch.condition, micro.batch.size
    n = 1 + int(micro.random.shared.integers(1, max_steps, "steps"))
    times = micro.random.uniform(size * (n - 1), *inner, "grid").reshape(size, n - 1).sort(1, descending=True).values
    times = torch.cat([torch.ones(size, 1, dtype=torch.float64), times], 1)
    last = micro.random.integers(size, n, "state")
    x = start(micro, schedule, 1.0)
    with torch.no_grad():
        for i in range(n - 1):
            rows = (last > i).nonzero()[:, 0]
            if len(rows):
                there = rows.to(x.device)
                p = roles.predict("student", x[there], times[rows, i], condition.index(there)).out
                x[there] = add_noise(schedule, p.x0, p.noise, times[rows, i + 1])
    t_student = times[torch.arange(size), last]
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(p.x0, torch.zeros_like(t_student), p.x0, t_student, condition, noise=p.noise.detach())


def phased_rollout(
    micro: MicroBatch, roles: Roles, walkers: Sequence[str], nodes: Sequence[float], first: int, end: int
) -> StudentSample:
    """The state at node ``end`` of a trajectory that several experts walk (Phased DMD, arXiv 2510.27684).

    ``walkers[i]`` is the role that takes step i of ``nodes``. One of the steps ``first`` .. ``end - 1``, drawn once for
    all processes, is the last: from it the student jumps to the end. The anchor is that state, at its own noise level.
    """
    schedule = roles.denoiser("student").schedule
    condition, size = micro.batch.condition, micro.batch.size
    last = first + int(micro.random.shared.integers(1, end - first, "exit"))
    x = start(micro, schedule, nodes[0])
    t_student, s = (torch.full((size,), nodes[i], dtype=torch.float64) for i in (last, end))
    with torch.no_grad():
        for i in range(last):
            p = roles.predict(walkers[i], x, nodes[i], condition).out
            x = add_noise(schedule, p.x0, p.noise, torch.full((size,), nodes[i + 1], dtype=torch.float64))
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(add_noise(schedule, p.x0, p.noise, s), s, p.x0, t_student, condition)
