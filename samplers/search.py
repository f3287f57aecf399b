"""Solver schedules by evolutionary search over the decisions of ``multistep`` (USF and S^3, arXiv 2312.07243).

A schedule consists of its times and, for every step, the order, form, relaxation and correction; every multistep rule
of this package is one. The search only needs a score. For example, to find the six steps that come nearest to a long
run from the same noise:

    start = SolverSchedule(grid(schedule, 6), tuple(unipc_steps(6)))
    best = evolve([start], lambda s: (s(predict, x) - exact).square().mean().item(), rounds=200)[0][1]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from fewstep.samplers.exponential import Relaxation
from fewstep.samplers.grids import check_times
from fewstep.samplers.multistep import Step, multistep
from fewstep.samplers.predictor import Predictor

RELAXATIONS: tuple[Relaxation, ...] = get_args(Relaxation)


@dataclass(frozen=True)
class SolverSchedule:
    """N steps and their N + 1 decreasing times."""

    times: tuple[float, ...]
    steps: tuple[Step, ...]

    def __call__(self, predict: Predictor, x: Tensor) -> Tensor:
        return multistep(predict, x, self.times, self.steps)


def mutate(schedule: SolverSchedule, rng: random.Random, rate: float = 0.3, spread: float = 0.08) -> SolverSchedule:
    """A neighbour of ``schedule``: each inner time is scaled by a normal factor of deviation ``spread``, and each
    decision is sampled again, with probability ``rate``. The times are sorted; the first and the last do not change."""
    inner = [t * (1 + rng.gauss(0, spread)) if rng.random() < rate else t for t in schedule.times[1:-1]]
    first, last = schedule.times[0], schedule.times[-1]
    times = sorted((min(max(t, last + 1e-4), first - 1e-4) for t in inner), reverse=True)
    for k in range(1, len(times)):  # no two are equal
        times[k] = min(times[k], times[k - 1] - 1e-5)
    return SolverSchedule(check_times([first, *times, last]), tuple(_mutate_step(s, rng, rate) for s in schedule.steps))


def _mutate_step(step: Step, rng: random.Random, rate: float) -> Step:
    if rng.random() < rate:
        step = replace(step, order=rng.choice((1, 2, 2, 3)))
    if rng.random() < rate:
        step = replace(step, form=rng.choice(("data", "noise")))
    if rng.random() < rate:
        step = replace(step, relaxation=rng.choice(RELAXATIONS))
    if rng.random() < rate:
        step = replace(step, correct=not step.correct)
    return step


def cross(a: SolverSchedule, b: SolverSchedule, rng: random.Random) -> SolverSchedule:
    """The times of one schedule and, for each step, the decisions of either; both have the same number of steps."""
    steps = tuple(rng.choice(pair) for pair in zip(a.steps, b.steps, strict=True))
    return SolverSchedule(rng.choice((a, b)).times, steps)


def evolve(
    start: Sequence[SolverSchedule], score: Callable[[SolverSchedule], float], *, rounds: int, parents: int = 15,
    seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, SolverSchedule]]:  # fmt: skip
    """The ``parents`` best schedules with their scores, the lowest score first; nan counts as infinite.

    Each of ``rounds`` adds one schedule: with probability 0.3 a cross of two of the best, otherwise a mutation of one.
    ``progress`` receives (rounds done, rounds).
    """
    rng = random.Random(seed)
    best = sorted(((_finite(score(s)), s) for s in start), key=lambda pair: pair[0])
    for done in range(1, rounds + 1):
        pool = [schedule for _, schedule in best[:parents]]
        a = rng.choice(pool)
        child = cross(a, rng.choice(pool), rng) if rng.random() < 0.3 else mutate(a, rng)
        best = sorted([*best[:parents], (_finite(score(child)), child)], key=lambda pair: pair[0])
        if progress is not None:
            progress(done, rounds)
    return best[:parents]


def _finite(value: float) -> float:
    return value if value == value else float("inf")
