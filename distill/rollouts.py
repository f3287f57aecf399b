"""Rollouts: how the student generates the sample that it is trained on. Only its last evaluation has a graph.

A rollout starts from pure noise at ``times[0]`` and follows the student's own decreasing times. It returns a
``StudentSample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core.transfer import like, send
from fewstep.distill.roles import Roles
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import LastStep, MicroBatch, StudentSample
from fewstep.models.condition import Condition
from fewstep.models.denoiser import expand_like
from fewstep.models.schedules import NoiseSchedule


def initial_noise(micro: MicroBatch, schedule: NoiseSchedule, time: float) -> Tensor:
    """Noise [B, ...] of the level of ``time``, without the image that the schedule may leave there."""
    noise = micro.random.normal((micro.batch.size, *micro.batch.shape), "start")
    return noise * float(schedule.sigma(torch.tensor(time, dtype=torch.float64)))


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``alpha(t) x0 + sigma(t) noise`` for times [B]."""
    times = expand_like(t, x0)
    alpha, sigma = like(x0, schedule.alpha(times), schedule.sigma(times))
    return alpha * x0 + sigma * noise


def in_turn(micro: MicroBatch, n: int, stream: str) -> Tensor:
    """One of 0 .. n - 1 for each sample, [B], in turn over the samples of all micro-batches and processes, from a
    random start: each occurs equally often, however the batch is divided."""
    start = micro.random.shared.integers(1, n, stream)
    return (micro.first_sample + torch.arange(micro.batch.size) + start) % n


def backward_simulation(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """Backward simulation of DMD2 (arXiv 2405.14867, section 4.5): predict x0, noise it to the next time, and so on.

    Each sample has its own last step (``in_turn``); it is the x0 predicted there (level 0). With a single time this is
    the one-step student.
    """
    schedule = roles.denoiser("student").schedule
    condition = micro.batch.condition
    last = in_turn(micro, len(times), "exit")
    x = initial_noise(micro, schedule, times[0])
    with torch.no_grad():
        for i, (now, following) in enumerate(pairwise(times)):
            noise = micro.random.normal(x.shape, "renoise")
            _advance(roles, "student", x, last > i, _full(len(x), now), _full(len(x), following), condition, noise)
    t_student = torch.tensor(times, dtype=torch.float64)[last]

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        return roles.predict("student", x, t, condition).out.x0

    x0 = evaluate(x, t_student)
    return StudentSample(x0, torch.zeros_like(t_student), x0, t_student, condition, last=LastStep(x, evaluate))


def segment_rollout(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """The student's deterministic trajectory, up to the end of one of its steps (TDM, arXiv 2503.06674, section 3).

    Each sample has its own segment (``in_turn``). It is the state x_s at the segment's end; the gradient goes to the x0
    that it came from.
    """
    schedule = roles.denoiser("student").schedule
    condition = micro.batch.condition
    x = initial_noise(micro, schedule, times[0])
    segment = in_turn(micro, len(times), "segment")
    nodes = torch.tensor([*times, 0.0], dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(times) - 1):
            now, following = nodes[i : i + 2, None].expand(2, len(x))
            _advance(roles, "student", x, segment > i, now, following, condition)
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
            _advance(roles, "student", x, last > i, times[:, i], times[:, i + 1], condition)
    t_student = times[torch.arange(size), last]
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(p.x0, torch.zeros_like(t_student), p.x0, t_student, condition, noise=p.noise.detach())


def phased_rollout(
    micro: MicroBatch, roles: Roles, experts: Sequence[str], times: Sequence[float], first: int, end: int
) -> StudentSample:
    """The state at ``times[end]`` of a trajectory that several experts share (Phased DMD, arXiv 2510.27684).

    ``experts[i]`` is the role that takes step i of ``times``. Each sample has its own last step of ``first`` ..
    ``end - 1`` (``in_turn``): from it the student jumps to the end. The sample is that state, at its own noise level.
    """
    schedule = roles.denoiser("student").schedule
    condition, size = micro.batch.condition, micro.batch.size
    last = first + in_turn(micro, end - first, "exit")
    x = initial_noise(micro, schedule, times[0])
    with torch.no_grad():
        for i in range(end - 1):
            now, following = _full(size, times[i]), _full(size, times[i + 1])
            _advance(roles, experts[i], x, last > i, now, following, condition)
    t_student, level = torch.tensor(times, dtype=torch.float64)[last], _full(size, times[end])
    p = roles.predict("student", x, t_student, condition).out
    return StudentSample(add_noise(schedule, p.x0, p.noise, level), level, p.x0, t_student, condition)


def _advance(
    roles: Roles, role: str, x: Tensor, moving: Tensor, now: Tensor, following: Tensor, condition: Condition,
    noise: Tensor | None = None,
) -> None:  # fmt: skip
    """Takes the samples of ``x`` where ``moving`` [B] from times ``now`` [B] to ``following`` [B], in place: to the x0
    that a role predicts with ``noise``, by default the noise that it predicts."""
    if not moving.any():
        if roles.split:  # all processes must evaluate a network that is split over them
            roles.predict(role, x[:1], 0.5, condition.index(slice(1)))
        return
    chosen = moving.nonzero()[:, 0]
    rows = send(chosen, x.device)
    p = roles.predict(role, x[rows], now[chosen], condition.index(rows)).out
    noise = p.noise if noise is None else noise[rows]
    x[rows] = add_noise(roles.denoiser(role).schedule, p.x0, noise, following[chosen])


def _full(size: int, time: float) -> Tensor:
    return torch.full((size,), time, dtype=torch.float64)
