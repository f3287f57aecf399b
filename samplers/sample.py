"""Samples from a model: noise that belongs to the sample's number, a solver, batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.distill.draws import Draws
from fewstep.errors import UserError, nearest
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import OFF, Guidance
from fewstep.models.store import FewStep
from fewstep.samplers.ddim import ddim
from fewstep.samplers.euler import euler
from fewstep.samplers.few_step import renoise
from fewstep.samplers.grids import time_uniform
from fewstep.samplers.heun import heun
from fewstep.samplers.predictor import Predictor

Solver = Callable[[Predictor, Tensor, Sequence[float]], Tensor]
SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ddim": ddim}


class Samples(NamedTuple):
    """Clean samples [N, ...], in the model's range, and the network evaluations that each cost."""

    x0: Tensor
    nfe: int


class SampleNoise:
    """The noise of the samples ``numbers``: a function of (seed, number) only, whatever the batch they are drawn in."""

    def __init__(self, seed: int, numbers: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self._draws = [Draws(seed, number, "sample", 0) for number in numbers]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        return torch.stack([draws.normal(self._shape) for draws in self._draws]).to(self._device)


def plan(solver: str, steps: int | None, few_step: FewStep | None, shift: float = 1.0) -> tuple[str, tuple[float, ...]]:
    """The rule and the nodes of a request: ``student`` takes both from how the model was distilled; ``shift`` is that
    of a teacher's grid.

    A student of K steps may be asked for any number of steps; other numbers than K spread as its own
    times do. Raises ``UserError`` for an unknown solver, a missing step count, or a student's solver on a teacher.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    if few_step and few_step.counts and steps is not None and steps not in few_step.counts:
        served = ", ".join(map(str, few_step.counts))
        raise UserError(f"This student is told its number of steps and serves {served}, got {steps}.")
    if solver == "student":
        if few_step is None:
            raise UserError(
                "This model is no distilled student, so it has no rule of its own; choose --solver "
                + ", ".join(SOLVERS)
                + " and --steps."
            )
        if steps is None or steps == len(few_step.times):
            return few_step.rule, (*few_step.times, 0.0)
        return few_step.rule, time_uniform(steps, few_step.shift)
    if solver not in SOLVERS:
        raise UserError(f"Unknown solver {solver!r}{nearest(solver, ['student', *SOLVERS])}.")
    if steps is None:
        raise UserError(f"The solver {solver!r} needs a number of steps.")
    return solver, time_uniform(steps, shift)


def steps_within(solver: str, nfe: int, guided: bool) -> int:
    """The most steps of a rule that ``nfe`` evaluations allow. Raises ``UserError`` if they do not allow one."""
    reads = nfe // 2 if guided else nfe
    steps = (reads + 1) // 2 if solver == "heun" else reads
    if steps < 1:
        raise UserError(f"{nfe} evaluations are too few for one step of {solver!r}{' with guidance' * guided}.")
    return steps


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    condition: Condition,
    shape: tuple[int, ...],
    n: int,
    *,
    rule: str,
    times: Sequence[float],
    guidance: Guidance = OFF,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch: int = 100,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """Draws ``n`` samples, one a row of ``condition``, by ``rule`` over ``times``.

    ``rule`` is a key of ``SOLVERS``, ``deterministic`` or ``renoise``. A sample's noise depends on ``seed`` and its
    number alone (``numbers``; 0 to n - 1 by default), whatever the batch.
    """
    start = float(denoiser.schedule.sigma(torch.tensor(times[0], dtype=torch.float64)))
    numbers = range(n) if numbers is None else numbers
    parts, nfe = [], 0
    for low in range(0, n, batch):
        rows = slice(low, min(low + batch, n))
        noise = SampleNoise(seed, numbers[rows], shape, torch.device(device))
        predict = Predictor(denoiser, condition.index(rows).to(device), guidance)
        x = start * noise()
        x = renoise(predict, x, times, noise) if rule == "renoise" else _solver(rule)(predict, x, times)
        parts.append(x.cpu())
        nfe = predict.nfe
        if progress is not None:
            progress(rows.stop)
    return Samples(torch.cat(parts), nfe)


def _solver(rule: str) -> Solver:
    return ddim if rule == "deterministic" else SOLVERS[rule]
