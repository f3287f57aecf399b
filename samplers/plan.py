"""From a request (solver, steps, guidance, grid) to the rule and the times of a sampling run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

import torch

from fewstep.core.errors import UserError, nearest
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.schedules import schedule_from_dict
from fewstep.samplers.grids import LEAST, MOST, Spacing, grid, time_uniform
from fewstep.samplers.solvers import SOLVERS, STUDENTS, Solver, find_solver

TEACHER_STEPS = 32


@dataclass(frozen=True)
class SamplingConfig:
    """How a model is sampled.

    ``solver``: a name that ``fewstep solver list`` shows, or ``student`` for a student's own few-step rule; by default
    a student's own rule, and Euler for a teacher. ``steps``: by default a student's own number, and 32 for a teacher.
    ``guidance``: 1 is off. ``grid``: the spacing of a teacher's times (see ``grids.grid``), optionally with the smallest
    time before 0, as ``log_snr:0.02``. ``seed``: of the noise.
    """

    solver: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    grid: str = "time"
    seed: int = 0


class Plan(NamedTuple):
    """The solver and its times, from the noisiest to the cleanest."""

    solver: Solver
    times: tuple[float, ...]


def plan(model: Model, config: SamplingConfig) -> Plan:
    """The rule and the times of a request. A student of K steps may be asked for any number of steps; numbers other
    than K are spaced as its own times are.

    Raises ``UserError`` on an unknown solver or grid, and on combinations that do not work: a student's rule for a
    teacher; guidance, a grid or a solver of higher order for a student.
    """
    few_step = model.config.few_step
    name = config.solver or ("student" if few_step else "euler")
    steps = config.steps
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    if few_step and few_step.counts and steps is not None and steps not in few_step.counts:
        served = ", ".join(map(str, few_step.counts))
        raise UserError(f"This student is conditioned on its number of steps and supports {served}, got {steps}.")
    if few_step is not None and config.guidance != 1:
        raise UserError(
            f"A distilled student has its guidance in its weights, so guidance must be 1, got {config.guidance:g}."
        )
    if name == "student":
        return _student_plan(model.config, steps, config.grid)
    if steps is None:
        if few_step is not None:
            raise UserError(f"The solver {name!r} needs a number of steps.")
        steps = TEACHER_STEPS
    solver = find_solver(name, steps, config.guidance, model.path)
    if few_step is not None and solver.order > 1:
        raise UserError(
            f"The solver {name!r} extrapolates along a teacher's smooth path, which a distilled student does not have: "
            "choose student, euler or ddim."
        )
    return Plan(solver, _nodes(solver, steps, model.config, config.grid))


def _student_plan(config: ModelConfig, steps: int | None, spacing: str) -> Plan:
    if spacing != "time":
        raise UserError(f"A student is sampled at its own times, not on a grid {spacing!r}; choose another solver.")
    few_step = config.few_step
    if few_step is None:
        raise UserError(
            f"This model is not a distilled student, so it has no rule of its own; choose a solver: {', '.join(SOLVERS)}."
        )
    if steps is None or steps == len(few_step.times):
        return Plan(STUDENTS[few_step.rule], (*few_step.times, 0.0))
    return Plan(STUDENTS[few_step.rule], time_uniform(steps, few_step.shift))


def _nodes(solver: Solver, steps: int, config: ModelConfig, spacing: str) -> tuple[float, ...]:
    name, _, least = spacing.partition(":")
    if name not in get_args(Spacing):
        raise UserError(f"Unknown grid {name!r}{nearest(name, get_args(Spacing))}.")
    schedule = schedule_from_dict(config.noise_schedule)
    start = schedule.log_snr(torch.ones((), dtype=torch.float64))
    most = MOST if solver.by_log_snr and not start.isfinite() else 1.0
    if name == "time" and least:
        raise UserError("The grid 'time' ends at 0 in equal steps, so it takes no smallest time.")
    try:
        lowest = float(least) if least else LEAST
        return grid(schedule, steps, cast(Spacing, name), factor=config.shift, most=most, least=lowest)
    except ValueError as error:
        raise UserError(f"The grid {spacing!r} does not work: {error}.") from error


def steps_within(solver: str, nfe: int, guided: bool, config: ModelConfig) -> int:
    """The largest number of steps of a solver within ``nfe`` evaluations per sample. Raises ``UserError`` if even one
    step needs more."""
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
