"""From a sampling request (solver, steps, guidance, grid) to a solver and its times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

import torch

from fewstep.core.errors import UserError, nearest
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.schedules import schedule_from_dict
from fewstep.samplers.grids import T_MAX, T_MIN, Spacing, grid, time_uniform
from fewstep.samplers.solvers import REGISTRY, STUDENT_SOLVERS, Solver, find_solver

TEACHER_STEPS = 32


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample a model.

    ``solver``: a name from ``fewstep solver list``, the dotted name of your own solver, or ``student`` (a student's own
    few-step rule); by default ``student`` for a student and ``euler`` for a teacher. ``steps``: by default a student's
    own number, and 32 for a teacher. ``guidance``: 1 is off. ``grid``: the spacing of a teacher's times (see
    ``grids.grid``), optionally with the smallest time above 0, as in ``log_snr:0.02``. ``seed``: of the noise.
    """

    solver: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    grid: str = "time"
    seed: int = 0


class Plan(NamedTuple):
    """A solver and its decreasing times."""

    solver: Solver
    times: tuple[float, ...]


def plan(model: Model, config: SamplingConfig) -> Plan:
    """The solver and times of a request. A student of K steps accepts other numbers of steps, spaced as its own times,
    unless it is conditioned on the number.

    Raises ``UserError`` on an unknown solver or grid, and on invalid combinations: a student's rule for a teacher;
    guidance, a grid or a solver of higher order for a student.
    """
    few_step = model.config.few_step
    name = config.solver or ("student" if few_step else "euler")
    steps = config.steps
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    if few_step and few_step.counts and steps is not None and steps not in few_step.counts:
        supported = ", ".join(map(str, few_step.counts))
        raise UserError(f"This student is conditioned on its number of steps and supports {supported}, got {steps}.")
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
    return Plan(solver, _teacher_times(solver, steps, model.config, config.grid))


def _student_plan(config: ModelConfig, steps: int | None, spacing: str) -> Plan:
    if spacing != "time":
        raise UserError(f"A student is sampled at its own times, not on a grid {spacing!r}; choose another solver.")
    few_step = config.few_step
    if few_step is None:
        solvers = ", ".join(REGISTRY.names())
        raise UserError(f"This model is not a distilled student and has no few-step rule; choose a solver: {solvers}.")
    solver = STUDENT_SOLVERS[few_step.rule]
    if steps is None or steps == len(few_step.times):
        return Plan(solver, (*few_step.times, 0.0))
    return Plan(solver, time_uniform(steps, few_step.shift))


def _teacher_times(solver: Solver, steps: int, config: ModelConfig, spacing: str) -> tuple[float, ...]:
    name, _, smallest = spacing.partition(":")
    if name not in get_args(Spacing):
        raise UserError(f"Unknown grid {name!r}{nearest(name, get_args(Spacing))}.")
    if name == "time" and smallest:
        raise UserError("The grid 'time' ends at 0 in equal steps, so it takes no smallest time.")
    schedule = schedule_from_dict(config.noise_schedule)
    infinite = not schedule.log_snr(torch.ones((), dtype=torch.float64)).isfinite()
    t_max = T_MAX if solver.by_log_snr and infinite else 1.0
    try:
        t_min = float(smallest) if smallest else T_MIN
        return grid(schedule, steps, cast(Spacing, name), factor=config.shift, t_max=t_max, t_min=t_min)
    except ValueError as error:
        raise UserError(f"The grid {spacing!r} does not work: {error}.") from error


def steps_within(solver: str, nfe: int, guided: bool, config: ModelConfig) -> int:
    """The largest number of steps of a solver within ``nfe`` network evaluations per sample. Raises ``UserError`` on an
    unknown solver, or if a single step needs more."""
    budget = nfe // 2 if guided else nfe
    found = STUDENT_SOLVERS["deterministic"] if solver == "student" else REGISTRY.resolve(solver)
    schedule = schedule_from_dict(config.noise_schedule)

    def fits(steps: int) -> bool:
        if not isinstance(found, Solver) or found.evaluations_per_step == 1:
            return steps <= budget
        return found.count_evaluations(schedule, _teacher_times(found, steps, config, "time")) <= budget

    fitting = [steps for steps in range(1, budget + 1) if fits(steps)]
    if not fitting:
        raise UserError(f"{nfe} evaluations are too few for one step of {solver!r}{' with guidance' * guided}.")
    return fitting[-1]
