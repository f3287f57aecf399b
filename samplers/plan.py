"""From a sampling request (solver, steps, guidance, grid) to a solver and its times."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewstep.core.errors import UserError
from fewstep.core.limits import MOST_STEPS, check_count
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.schedules import schedule_from_dict
from fewstep.samplers.grids import T_MAX, given_steps, grid_of, time_uniform
from fewstep.samplers.solvers import REGISTRY, STUDENT_SOLVERS, FitRequest, Solver, find_solver, resolve_solver

TEACHER_STEPS = 32


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample a model.

    ``solver``: a name from ``fewstep solver list``, the dotted name of your own solver, or ``student`` (a student's own
    few-step rule); by default ``student`` for a student and ``euler`` for a teacher. ``steps``: by default a student's
    own number, and 32 for a teacher. ``guidance``: 1 is off. ``grid``: a teacher's times (see ``grids.grid_of``): a
    spacing, optionally with the smallest time above 0, as in ``log_snr:0.02``, or the times themselves, as in
    ``times:1,0.9,0.75,0.5``. ``seed``: of the noise. ``frames``: their number in a video that a causal model generates
    frame by frame, each in all steps; by default a student trained so generates as many as in training, and every other
    model all frames at once.
    """

    solver: str | None = None
    steps: int | None = None
    guidance: float = 1.0
    grid: str = "time"
    seed: int = 0
    frames: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types; ``frames`` only if it is set."""
        return {name: value for name, value in asdict(self).items() if name != "frames" or value is not None}


class Plan(NamedTuple):
    """A solver and its decreasing times."""

    solver: Solver
    times: tuple[float, ...]


def plan(model: Model, config: SamplingConfig) -> Plan:
    """The solver and times of a request. A student of K steps accepts other numbers of steps, spaced as its own times,
    unless it is conditioned on the number.

    Raises ``UserError`` on an unknown solver or grid, and on invalid combinations: a student's rule for a teacher;
    guidance, a grid or a solver of higher order for a student; frames of a model that cannot generate one by one.
    """
    few_step = model.config.few_step
    name = config.solver if config.solver is not None else ("student" if few_step else "euler")
    steps = config.steps
    if steps is not None:
        check_count("steps", steps, MOST_STEPS)
    if not math.isfinite(config.guidance):
        raise UserError(f"guidance must be a finite number, got {config.guidance}.")
    if few_step and few_step.counts and steps is not None and steps not in few_step.counts:
        supported = ", ".join(map(str, few_step.counts))
        raise UserError(f"This student is conditioned on its number of steps and supports {supported}, got {steps}.")
    if few_step is not None and config.guidance != 1:
        raise UserError(f"A student was distilled with its guidance, so guidance must be 1, got {config.guidance:g}.")
    model.config.require_guidable(config.guidance)
    frames_of(model, config)
    if name == "student":
        return _student_plan(model.config, steps, config.grid)
    if steps is None:
        steps = given_steps(config.grid) or (len(few_step.times) if few_step else TEACHER_STEPS)
    request = FitRequest(model.path or Path(), steps, config.guidance, config.grid, model.denoiser)
    solver = find_solver(name, request)
    if few_step is not None and solver.order > 1:
        raise UserError(
            f"The solver {name!r} extrapolates along a teacher's smooth path, which a distilled student does not have: "
            "choose student, euler or ddim."
        )
    return Plan(solver, _teacher_times(solver, steps, model.config, config.grid))


def frames_of(model: Model, config: SamplingConfig) -> int | None:
    """The number of frames that a request generates one after the other; None: the sample as a whole. Raises
    ``UserError`` if the model cannot."""
    few_step, frames = model.config.few_step, config.frames
    by_frame = few_step is not None and few_step.frame_by_frame is not None
    if frames is None and not by_frame:
        return None
    if not model.denoiser.causal:
        raise UserError(
            f"frames = {frames}: this model generates whole samples of the shape {list(model.config.shape)}; only a "
            "causal model of videos (model.backbone.causal: true) generates any number of frames. Leave frames out."
        )
    if few_step is not None and not by_frame:
        raise UserError(
            f"frames = {frames}: this student was trained to generate whole clips of {model.config.shape[1]} frames. "
            "Leave frames out, or train it with rollout: causal."
        )
    if frames is not None and frames < 1:
        raise UserError(f"frames must be at least 1, got {frames}.")
    return model.config.shape[1] if frames is None else frames


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


def _teacher_times(solver: Solver, steps: int, config: ModelConfig, text: str) -> tuple[float, ...]:
    schedule = schedule_from_dict(config.noise_schedule)
    pure_noise = not schedule.log_snr(torch.ones((), dtype=torch.float64)).isfinite()
    x0_undefined = config.prediction in ("noise", "score")  # at alpha = 0
    t_max = T_MAX if pure_noise and (solver.by_log_snr or x0_undefined) else 1.0
    return grid_of(schedule, steps, text, factor=config.shift, t_max=t_max)


def steps_within(solver: str, nfe: int, guided: bool, config: ModelConfig) -> int:
    """The largest number of steps of a solver within ``nfe`` network evaluations per sample.

    Raises ``UserError`` on an unknown solver, if a single step needs more, and if only a step of lower order and cost
    fits (the step to 0 is of first order in solvers that evaluate the model several times per step).
    """
    budget = nfe // 2 if guided else nfe
    found = STUDENT_SOLVERS["deterministic"] if solver == "student" else resolve_solver(solver)
    schedule = schedule_from_dict(config.noise_schedule)

    def cost(steps: int) -> int:
        if not isinstance(found, Solver) or found.evaluations_per_step == 1:
            return steps
        return found.count_evaluations(schedule, _teacher_times(found, steps, config, "time"))

    fitting = [steps for steps in range(1, budget + 1) if cost(steps) <= budget]
    if not fitting or (fitting == [1] and cost(1) < min(budget, found.evaluations_per_step)):
        raise UserError(f"{nfe} evaluations are too few for one step of {solver!r}{' with guidance' * guided}.")
    return fitting[-1]
