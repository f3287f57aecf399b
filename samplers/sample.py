"""Samples from a model: noise that belongs to the sample's number, a solver, batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from fewstep.distill.draws import Draws
from fewstep.errors import UserError, nearest
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import OFF, Guidance
from fewstep.models.schedules import schedule_from_dict
from fewstep.models.store import ModelConfig
from fewstep.samplers.grids import LEAST, MOST, Spacing, grid, time_uniform
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, STUDENTS, Solver, find_solver


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


class Plan(NamedTuple):
    """How to sample: the solver and the nodes."""

    rule: Solver
    times: tuple[float, ...]


def plan(
    solver: str, steps: int | None, config: ModelConfig, spacing: str = "time", folder: Path | None = None,
    guidance: float = 1.0,
) -> Plan:  # fmt: skip
    """The rule and the nodes of a request: ``student`` takes both from how the model was distilled.

    A student of K steps may be asked for any number of steps; other numbers than K spread as its own times do.
    ``spacing`` of a teacher's grid (see ``grids.grid``) may name the least time before 0, too: ``log_snr:0.02``. The
    model's ``folder`` holds what some solvers know of it, at a ``guidance``. Raises ``UserError`` for an unknown solver
    or spacing, a missing step count, and what does not go together: a student's solver and a teacher; guidance, a grid
    or a rule of higher order and a student.
    """
    few_step = config.few_step
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    if few_step and few_step.counts and steps is not None and steps not in few_step.counts:
        served = ", ".join(map(str, few_step.counts))
        raise UserError(f"This student is told its number of steps and serves {served}, got {steps}.")
    if few_step is not None and guidance != 1:
        raise UserError(
            f"A distilled student has its guidance in its weights, so guidance must be 1, got {guidance:g}."
        )
    if solver == "student":
        if spacing != "time":
            raise UserError(f"A student is sampled at its own times, not on a grid {spacing!r}; choose another solver.")
        if few_step is None:
            raise UserError(
                "This model is no distilled student, so it has no rule of its own; choose --solver "
                + ", ".join(SOLVERS)
                + " and --steps."
            )
        if steps is None or steps == len(few_step.times):
            return Plan(STUDENTS[few_step.rule], (*few_step.times, 0.0))
        return Plan(STUDENTS[few_step.rule], time_uniform(steps, few_step.shift))
    if steps is None:
        raise UserError(f"The solver {solver!r} needs a number of steps.")
    rule = find_solver(solver, steps, guidance, folder)
    if few_step is not None and rule.order > 1:
        raise UserError(
            f"The solver {solver!r} extrapolates along a teacher's smooth path; a distilled student has none: choose "
            "student, euler or ddim."
        )
    return Plan(rule, _nodes(rule, steps, config, spacing))


def _nodes(rule: Solver, steps: int, config: ModelConfig, spacing: str) -> tuple[float, ...]:
    name, _, least = spacing.partition(":")
    if name not in get_args(Spacing):
        raise UserError(f"Unknown grid {name!r}{nearest(name, get_args(Spacing))}.")
    schedule = schedule_from_dict(config.noise_schedule)
    start = schedule.log_snr(torch.ones((), dtype=torch.float64))
    most = MOST if rule.by_log_snr and not start.isfinite() else 1.0
    if name == "time" and least:
        raise UserError("The grid 'time' goes to 0 in equal steps, so it takes no least time.")
    try:
        lowest = float(least) if least else LEAST
        return grid(schedule, steps, cast(Spacing, name), factor=config.shift, most=most, least=lowest)
    except ValueError as error:
        raise UserError(f"The grid {spacing!r} does not work: {error}.") from error


def steps_within(solver: str, nfe: int, guided: bool, config: ModelConfig) -> int:
    """The most steps of a rule that ``nfe`` evaluations allow. Raises ``UserError`` if they do not allow one."""
    reads = nfe // 2 if guided else nfe
    rule, schedule = SOLVERS.get(solver, SOLVERS["ddim"]), schedule_from_dict(config.noise_schedule)
    fitting = [
        steps
        for steps in range(1, reads + 1)
        if rule.reads == 1 or rule.evaluations(schedule, _nodes(rule, steps, config, "time")) <= reads
    ]
    if not fitting:
        raise UserError(f"{nfe} evaluations are too few for one step of {solver!r}{' with guidance' * guided}.")
    return fitting[-1]


def sample(
    denoiser: Denoiser,
    condition: Condition,
    shape: tuple[int, ...],
    n: int,
    *,
    rule: Solver,
    times: Sequence[float],
    guidance: Guidance = OFF,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch: int = 100,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """Draws ``n`` samples, one a row of ``condition``, by ``rule`` over ``times``.

    A sample's noise depends on ``seed`` and its number alone (``numbers``; 0 to n - 1 by default), whatever the batch.
    Inference mode makes a small network's calls some percent faster; what is returned are ordinary tensors.
    """
    start = float(denoiser.schedule.sigma(torch.tensor(times[0], dtype=torch.float64)))
    numbers = range(n) if numbers is None else numbers
    parts, nfe = [], 0
    for low in range(0, n, batch):
        rows = slice(low, min(low + batch, n))
        noise = SampleNoise(seed, numbers[rows], shape, torch.device(device))
        predict = Predictor(denoiser, condition.index(rows).to(device), guidance)
        with torch.inference_mode():
            parts.append(rule(predict, start * noise(), times, noise).cpu())
        nfe = predict.nfe
        if progress is not None:
            progress(rows.stop)
    return Samples(torch.cat(parts), nfe)
