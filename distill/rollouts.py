"""Rollouts: how the student generates the sample that it is trained on. Only its last evaluation has a graph.

A rollout starts from pure noise at ``times[0]`` and follows the student's own decreasing times. It returns a
``StudentSample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.distill.roles import Roles
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import MicroBatch, StudentSample
from fewstep.models.denoiser import expand_like
from fewstep.models.schedules import NoiseSchedule


def initial_noise(micro: MicroBatch, schedule: NoiseSchedule, time: float) -> Tensor:
    """Noise [B, ...] of the level of ``time``, without the image that the schedule may leave there."""
    noise = micro.random.normal((micro.batch.size, *micro.batch.shape), "start")
    return noise * float(schedule.sigma(torch.tensor(time, dtype=torch.float64)))


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``alpha(t) x0 + sigma(t) noise`` for times [B]."""
    times = expand_like(t, x0)
    return schedule.alpha(times).to(x0) * x0 + schedule.sigma(times).to(x0) * noise


def backward_simulation(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """Backward simulation of DMD2 (arXiv 2405.14867, section 4.5): predict x0, noise it to the next time, and so on.

    The last step is chosen at random, once per training step for all processes; the sample is the x0 predicted there
    (level 0). With a single time this is the one-step student.
    """
    schedule = roles.denoiser("student").schedule
    condition, size = micro.batch.condition, micro.batch.size
    last = int(micro.random.shared.integers(1, len(times), "exit"))
    x = initial_noise(micro, schedule, times[0])
    with torch.no_grad():
        for now, following in pairwise(times[: last + 1]):
            x0 = roles.predict("student", x, now, condition).out.x0
            x = add_noise(schedule, x0, micro.random.normal(x.shape, "renoise"), _full(size, following))
    x0 = roles.predict("student", x, times[last], condition).out.x0
    return StudentSample(x0, _full(size, 0.0), x0, _full(size, times[last]), condition)


def segment_rollout(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """The student's deterministic trajectory, up to the end of one of its steps (TDM, arXiv 2503.06674, section 3).

    Each sample has its own segment. Segments are assigned in turn from a shared random start, so that every shard costs
    the same. The sample is the state x_s at the segment's end; the gradient goes to the x0 that it came from.
    """
    schedule = roles.denoiser("student").schedule
    condition = micro.batch.condition
    x = initial_noise(micro, schedule, times[0])
    segment = (torch.arange(len(x)) + micro.random.shared.integers(1, len(times), "segment")) % len(times)
    nodes = torch.tensor([*times, 0.0], dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(times) - 1):
            rows = (segment > i).nonzero()[:, 0].to(x.device)
            if len(rows):
                p = roles.predict("student", x[rows], times[i], condition.index(rows)).out
                x[rows] = add_noise(schedule, p.x0, p.noise, nodes[i + 1].expand(len(rows)))
    t_student, level = nodes[segment], nodes[segment + 1]
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(add_noise(schedule, p.x0, p.noise, level), level, p.x0, t_student, condition)


def random_time_rollout(micro: MicroBatch, roles: Roles, max_steps: int, law: TimeLaw) -> StudentSample:
    """A deterministic trajectory over random times, up to a random one of them (CDM, arXiv 2605.06376).

    Its length N in 1..max_steps is the same in all processes. Each sample has its own N - 1 times of ``law`` below 1,
    and stops at its own one of the N states. The sample is the x0 predicted there (level 0), with the noise that the
    prediction implies.
    """
    schedule = roles.denoiser("student").schedule
    condition, size = micro.batch.condition, micro.batch.size
    n = 1 + int(micro.random.shared.integers(1, max_steps, "steps"))
    times = law.sample(micro.random, size * (n - 1), "grid").reshape(size, n - 1).sort(1, descending=True).values
    times = torch.cat([torch.ones(size, 1, dtype=torch.float64), times], 1)
    last = micro.random.integers(size, n, "state")
    x = initial_noise(micro, schedule, 1.0)
    with torch.no_grad():
        for i in range(n - 1):
            rows = (last > i).nonzero()[:, 0]
            if len(rows):
                on_device = rows.to(x.device)
                p = roles.predict("student", x[on_device], times[rows, i], condition.index(on_device)).out
                x[on_device] = add_noise(schedule, p.x0, p.noise, times[rows, i + 1])
    t_student = times[torch.arange(size), last]
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(p.x0, torch.zeros_like(t_student), p.x0, t_student, condition, noise=p.noise.detach())


def phased_rollout(
    micro: MicroBatch, roles: Roles, experts: Sequence[str], times: Sequence[float], first: int, end: int
) -> StudentSample:
    """The state at ``times[end]`` of a trajectory that several experts share (Phased DMD, arXiv 2510.27684).

    ``experts[i]`` is the role that takes step i of ``times``. The last step is a random one of ``first`` ..
    ``end - 1``, the same in all processes: from it the student jumps to the end. The sample is that state, at its own
    noise level.
    """
    schedule = roles.denoiser("student").schedule
    condition, size = micro.batch.condition, micro.batch.size
    last = first + int(micro.random.shared.integers(1, end - first, "exit"))
    x = initial_noise(micro, schedule, times[0])
    with torch.no_grad():
        for i in range(last):
            p = roles.predict(experts[i], x, times[i], condition).out
            x = add_noise(schedule, p.x0, p.noise, _full(size, times[i + 1]))
    t_student, level = _full(size, times[last]), _full(size, times[end])
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(add_noise(schedule, p.x0, p.noise, level), level, p.x0, t_student, condition)


def _full(size: int, time: float) -> Tensor:
    return torch.full((size,), time, dtype=torch.float64)
