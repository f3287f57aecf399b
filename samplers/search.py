"""Solver schedules by search (USF and S^3, arXiv 2312.07243): evolution over the decisions of ``multistep``.

A schedule is its times and, for every step, its order, its form, its relaxation and whether it is corrected: every
multistep rule of this package is one. The search only needs something to rank schedules by. For example, six steps that
come nearest to a long run from the same noise:

    start = Schedule(grid(schedule, 6), tuple(unipc_steps(6)))
    best = evolve([start], lambda s: (s(predict, x) - exact).square().mean().item(), rounds=200)[0][1]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from fewstep.samplers.exponential import Relaxation
from fewstep.samplers.grids import checked
from fewstep.samplers.multistep import Step, multistep
from fewstep.samplers.predictor import Predictor

RELAXATIONS: tuple[Relaxation, ...] = get_args(Relaxation)


@dataclass(frozen=True)
class Schedule:
    """Falling times, one more than steps."""

    times: tuple[float, ...]
    steps: tuple[Step, ...]

    def __call__(self, predict: Predictor, x: Tensor) -> Tensor:
        return multistep(predict, x, self.times, self.steps)


def mutated(schedule: Schedule, rng: random.Random, rate: float = 0.3, spread: float = 0.08) -> Schedule:
    """A neighbour: every inner time moves by a normal share, every decision is drawn anew, each with chance ``rate``.
    The ends stay. Times that no longer fall are sorted."""
    inner = [t * (1 + rng.gauss(0, spread)) if rng.random() < rate else t for t in schedule.times[1:-1]]
    first, last = schedule.times[0], schedule.times[-1]
    kept = sorted((min(max(t, last + 1e-4), first - 1e-4) for t in inner), reverse=True)
    for k in range(1, len(kept)):  # no two the same
        kept[k] = min(kept[k], kept[k - 1] - 1e-5)
    return Schedule(checked([first, *kept, last]), tuple(_mutated(s, rng, rate) for s in schedule.steps))


def _mutated(step: Step, rng: random.Random, rate: float) -> Step:
    if rng.random() < rate:
        step = replace(step, order=rng.choice((1, 2, 2, 3)))
    if rng.random() < rate:
        step = replace(step, form=rng.choice(("data", "noise")))
    if rng.random() < rate:
        step = replace(step, relaxation=rng.choice(RELAXATIONS))
    if rng.random() < rate:
        step = replace(step, correct=not step.correct)
    return step


def crossed(a: Schedule, b: Schedule, rng: random.Random) -> Schedule:
    """The times of one and, step by step, the decisions of either; both have the same number of steps."""
    chosen = tuple(rng.choice(pair) for pair in zip(a.steps, b.steps, strict=True))
    return Schedule(rng.choice((a, b)).times, chosen)


def evolve(
    start: Sequence[Schedule], score: Callable[[Schedule], float], *, rounds: int, parents: int = 15, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, Schedule]]:  # fmt: skip
    """The ``parents`` best schedules seen, with their scores, the best (lowest) first; one new schedule a round, a
    cross of two of the best with chance 0.3, or a mutation of one. A score that is not a number loses."""
    rng = random.Random(seed)
    best = sorted(((_finite(score(s)), s) for s in start), key=lambda pair: pair[0])
    for done in range(1, rounds + 1):
        pool = [schedule for _, schedule in best[:parents]]
        a = rng.choice(pool)
        child = crossed(a, rng.choice(pool), rng) if rng.random() < 0.3 else mutated(a, rng)
        best = sorted([*best[:parents], (_finite(score(child)), child)], key=lambda pair: pair[0])
        if progress is not None:
            progress(done, rounds)
    return best[:parents]


def _finite(value: float) -> float:
    return value if value == value else float("inf")
