"""diffusers' schedulers as solvers: the closed list of classes that work, and the refusal of all others."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from worlds import NOISE, mixture

from fewstep.core.errors import UserError
from fewstep.models.schedules import RectifiedFlow, VPDiscrete
from fewstep.samplers.diffusers_solver import SUPPORTED, solver_from_diffusers
from fewstep.samplers.grids import T_MAX, grid
from fewstep.samplers.solvers import SOLVERS

diffusers = pytest.importorskip("diffusers")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": BETAS | {"clip_sample": False, "timestep_spacing": "trailing"},
    "DPMSolverSinglestepScheduler": BETAS,
    "PNDMScheduler": BETAS | {"skip_prk_steps": True},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}


def truth(flow: bool, steps: int = 400) -> Tensor:
    schedule = RectifiedFlow() if flow else VPDiscrete.scaled_linear()
    times = grid(schedule, steps, t_max=T_MAX if flow else 1.0)
    predict = mixture(schedule)
    return SOLVERS["unipc_2"](predict, predict.nodes([1.0])[0].sigma * NOISE, times, lambda: NOISE)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_supported_class_converges_to_the_ode(name: str) -> None:
    flow = name.startswith("FlowMatch")
    schedule = RectifiedFlow() if flow else VPDiscrete.scaled_linear()
    predict = mixture(schedule)
    scheduler = getattr(diffusers, name)(**SETTINGS.get(name, BETAS | {"timestep_spacing": "trailing"}))
    rule = solver_from_diffusers(scheduler)
    for _ in range(2):  # a rule can be used again
        got = rule(predict, predict.nodes([1.0])[0].sigma * NOISE, grid(schedule, 250))
    assert (got - truth(flow)).square().mean().sqrt() < 0.03


@pytest.mark.parametrize("steps_trained", [500, 2000])
def test_timesteps_are_fractions_of_the_training_timesteps(steps_trained: int) -> None:
    schedule = VPDiscrete.scaled_linear(steps=steps_trained)
    settings = SETTINGS["DDIMScheduler"] | {"set_alpha_to_one": True}
    rule = solver_from_diffusers(diffusers.DDIMScheduler(steps_trained, **settings))
    times = grid(schedule, 10)
    x = mixture(schedule).nodes([1.0])[0].sigma * NOISE
    expected = SOLVERS["ddim"](mixture(schedule), NOISE, times, lambda: NOISE)
    assert (rule(mixture(schedule), x, times) - expected).abs().max() < 1e-4
    flow = mixture(RectifiedFlow())
    rule = solver_from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(steps_trained))
    assert (rule(flow, NOISE, grid(RectifiedFlow(), 250)) - truth(True)).square().mean().sqrt() < 0.03


def test_eulers_scheduler_of_a_flow_is_euler() -> None:
    """Its timesteps are the training timesteps times the time itself."""
    for steps_trained in (100, 1000):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(steps_trained)
        rule = solver_from_diffusers(scheduler)
        got = rule(mixture(RectifiedFlow()), NOISE, grid(RectifiedFlow(), 8))
        times = (scheduler.timesteps.double() / steps_trained).tolist()
        expected = SOLVERS["euler"](mixture(RectifiedFlow()), NOISE, (*times, 0.0), lambda: NOISE)
        assert (got - expected).abs().max() < 1e-4


def test_every_other_class_is_refused_by_name() -> None:
    classes = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")} - set(SUPPORTED)
    assert {"CMStochasticIterativeScheduler", "EDMEulerScheduler", "IPNDMScheduler"} <= classes
    for name in classes:
        with pytest.raises(UserError, match=rf"A {name} does not work as a solver.*known: DDIMScheduler"):
            solver_from_diffusers(type(name, (), {"config": {}})())


def test_schedulers_that_add_noise_or_shift_by_resolution_are_refused() -> None:
    for scheduler, message in (
        (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "adds noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "shifts by resolution"),
    ):
        with pytest.raises(UserError, match=message):
            solver_from_diffusers(scheduler)
