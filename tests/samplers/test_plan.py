"""From a request to a solver and its times: defaults, budgets of evaluations, and refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import FLOW, MIXTURE

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.loading import Model
from fewstep.models.mixture import MixtureBackbone
from fewstep.models.model_config import FewStep, ModelConfig
from fewstep.samplers.generate import integrate
from fewstep.samplers.grids import time_uniform
from fewstep.samplers.plan import SamplingConfig, plan, steps_within
from fewstep.samplers.solvers import SOLVERS, STUDENT_SOLVERS

CONFIG = ModelConfig(backbone={"name": "unet"}, shape=(2,))
TEACHER = Model(denoiser=Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0"), config=CONFIG)


def student(**few_step: Any) -> Model:
    config = CONFIG.model_copy(update={"few_step": FewStep(rule="renoise", **few_step)})
    return Model(denoiser=TEACHER.denoiser, config=config)


STUDENT = student(times=(1.0, 0.6))
RENOISE = STUDENT_SOLVERS["renoise"]


def test_by_default_a_student_uses_its_own_rule_and_a_teacher_32_euler_steps() -> None:
    assert plan(STUDENT, SamplingConfig()) == plan(STUDENT, SamplingConfig("student")) == (RENOISE, (1.0, 0.6, 0.0))
    assert plan(TEACHER, SamplingConfig()) == (SOLVERS["euler"], time_uniform(32))
    assert plan(TEACHER, SamplingConfig("euler", 1)) == (SOLVERS["euler"], (1.0, 0.0))
    assert plan(STUDENT, SamplingConfig("euler")) == (SOLVERS["euler"], time_uniform(2))


def test_a_student_takes_other_numbers_of_steps_with_the_spacing_of_its_times() -> None:
    assert plan(STUDENT, SamplingConfig("student", 4)) == (RENOISE, time_uniform(4))
    shifted = student(times=time_uniform(4, 3.0)[:-1], shift=3.0)
    assert plan(shifted, SamplingConfig("student", 2)) == (RENOISE, time_uniform(2, 3.0))
    assert plan(STUDENT, SamplingConfig("euler", 3)) == (SOLVERS["euler"], time_uniform(3))


def test_a_grid_takes_its_smallest_time_after_a_colon() -> None:
    solver, times = plan(TEACHER, SamplingConfig("dpmpp_2m", 5, grid="log_snr:0.02"))
    assert solver == SOLVERS["dpmpp_2m"]
    assert (times[0], times[-1], len(times)) == (0.999, 0.0, 6)
    assert times != plan(TEACHER, SamplingConfig("dpmpp_2m", 5, grid="log_snr")).times


def test_times_on_the_command_line_also_give_the_number_of_steps() -> None:
    assert plan(TEACHER, SamplingConfig("euler", grid="times:1,0.9,0.5")).times == (1.0, 0.9, 0.5, 0.0)


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc_2", "heun_edm"])
def test_a_flow_that_predicts_noise_starts_below_pure_noise(solver: str) -> None:
    """At t = 1, where alpha = 0, its prediction does not determine x0."""
    config = CONFIG.model_copy(update={"prediction": "noise"})

    class Noise(MixtureBackbone):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (x_t - (1 - t)[:, None] * super().forward(x_t, t, condition)) / t[:, None]

    model = Model(denoiser=Denoiser(Noise(MIXTURE, FLOW), FLOW, "noise"), config=config)
    request = plan(model, SamplingConfig(solver, 40))
    x = integrate(model.denoiser, Condition(), (2,), plan=request, numbers=range(50)).x0
    truth = integrate(
        TEACHER.denoiser, Condition(), (2,), plan=plan(TEACHER, SamplingConfig(solver, 40)), numbers=range(50)
    ).x0
    assert (x - truth).square().mean().sqrt() < 0.05


def test_heun_edm_does_not_diverge_on_its_default_grid() -> None:
    """A grid that starts just below t = 1 would give it one step over most of the range of sigma / alpha."""
    truth = integrate(
        TEACHER.denoiser, Condition(), (2,), plan=plan(TEACHER, SamplingConfig("unipc_3", 200)), numbers=range(50)
    ).x0
    for steps in (4, 8):
        request = plan(TEACHER, SamplingConfig("heun_edm", steps))
        x = integrate(TEACHER.denoiser, Condition(), (2,), plan=request, numbers=range(50)).x0
        assert (x - truth).square().mean().sqrt() < 0.3


def test_the_schedule_shift_of_a_teacher_applies_to_its_grid() -> None:
    shifted = Model(denoiser=TEACHER.denoiser, config=CONFIG.model_copy(update={"shift": 3.0}))
    assert plan(shifted, SamplingConfig("euler", 4)).times == time_uniform(4, 3.0)


@pytest.mark.parametrize(
    ("schedule", "prediction", "solver", "first"),
    [
        ("rectified_flow", "velocity", "euler", 1.0),
        ("rectified_flow", "velocity", "dpmpp_2m", 0.999),  # divides by differences in log-SNR
        ("rectified_flow", "noise", "euler", 0.999),  # which does not determine x0 at alpha = 0
        ("rectified_flow", "score", "euler", 0.999),
        ("vp_linear", "noise", "dpmpp_2m", 1.0),  # a finite log-SNR
        ("ve", "noise", "euler", 1.0),
    ],
)
def test_a_grid_starts_below_1_only_where_pure_noise_needs_it(
    schedule: str, prediction: str, solver: str, first: float
) -> None:
    config = CONFIG.model_copy(update={"noise_schedule": {"name": schedule}, "prediction": prediction})
    times = plan(Model(denoiser=TEACHER.denoiser, config=config), SamplingConfig(solver, 4)).times
    assert times == (first, *(first * k / 4 for k in (3, 2, 1)), 0.0)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (TEACHER, SamplingConfig("student", 4), "not a distilled student .* choose a solver: .*ddim.*unipc_2"),
        (TEACHER, SamplingConfig("eular", 4), "Unknown solver 'eular'; did you mean 'euler'"),
        (STUDENT, SamplingConfig("eular"), "Unknown solver 'eular'; did you mean 'euler'"),
        (TEACHER, SamplingConfig("euler", 0), "at least 1, got 0"),
        (TEACHER, SamplingConfig("euler", 4, grid="karas"), "did you mean 'karras'"),
        (TEACHER, SamplingConfig("euler", 4, grid="karras:2"), "grid 'karras:2' does not work"),
        (TEACHER, SamplingConfig("euler", 4, grid="karras:x"), "grid 'karras:x' does not work"),
        (TEACHER, SamplingConfig("euler", 4, grid="time:0.02"), "takes no smallest time"),
        (TEACHER, SamplingConfig("euler", 4, grid="beta:0.02"), "takes no smallest time"),
        (TEACHER, SamplingConfig("euler", 4, grid="quadratic:-0.1"), "smallest time must lie between 0 and 1"),
        (TEACHER, SamplingConfig("euler", 4, grid="times:1,0.5"), "it has 2 steps, but 4 were requested"),
        (TEACHER, SamplingConfig("euler", 4, guidance=float("nan")), "guidance must be a finite number, got nan"),
        (TEACHER, SamplingConfig("euler", 4, guidance=float("inf")), "guidance must be a finite number, got inf"),
        (TEACHER, SamplingConfig("dpm_solver_v3_2", 4), "run fewstep solver fit-v3"),
        (TEACHER, SamplingConfig("dc_solver_2", 4), "run fewstep solver fit-dc"),
        (STUDENT, SamplingConfig("student", guidance=2.0), "was distilled with its guidance"),
        (STUDENT, SamplingConfig("student", 4, grid="karras"), "sampled at its own times"),
        (STUDENT, SamplingConfig("unipc_2", 4), "choose student, euler or ddim"),
        (student(times=(1.0, 0.5), counts=(1, 2)), SamplingConfig(steps=3), "supports 1, 2, got 3"),
    ],
)
def test_invalid_requests_are_refused(model: Model, config: SamplingConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(model, config)


def test_a_grid_of_beta_quantiles_without_scipy_is_refused_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"grid 'beta' does not work: its quantiles need scipy: pip install"):
        plan(TEACHER, SamplingConfig("euler", 4, grid="beta"))


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("nfe", [2, 3, 4, 7, 8, 33])
def test_steps_within_is_the_largest_number_of_steps_that_fits(solver: str, scale: float, nfe: int) -> None:
    def cost(steps: int) -> int:
        condition = Condition.of_labels(torch.zeros(1, dtype=torch.long), 2)
        request = plan(TEACHER, SamplingConfig(solver, steps))
        denoiser, guidance = TEACHER.denoiser, Guidance(scale)
        return integrate(denoiser, condition, (2,), plan=request, numbers=range(1), guidance=guidance).nfe

    budget = nfe if scale == 1 else nfe // 2
    if cost(2) > nfe and cost(1) < budget * scale and SOLVERS[solver].evaluations_per_step > 1:
        with pytest.raises(UserError, match="too few for one step of"):  # only Euler's step to 0 would fit
            steps_within(solver, nfe, scale != 1, CONFIG)
        return
    steps = steps_within(solver, nfe, scale != 1, CONFIG)
    assert cost(steps) <= nfe < cost(steps + 1)


def test_student_and_fitted_solvers_evaluate_once_per_step() -> None:
    for solver in ("student", "dc_solver_2", "dpm_solver_v3_3"):
        assert steps_within(solver, 7, False, CONFIG) == 7
        assert steps_within(solver, 7, True, CONFIG) == 3


def test_a_last_step_of_lower_order_is_taken_only_if_no_whole_step_would_fit() -> None:
    """Heun's step to 0 is Euler's: 2N - 1 evaluations, so that 2 would be spent on one of Euler's."""
    assert [steps_within("heun", nfe, False, CONFIG) for nfe in (1, 3, 4, 5)] == [1, 2, 2, 3]
    with pytest.raises(UserError, match=r"2 evaluations are too few for one step of 'heun'\."):
        steps_within("heun", 2, False, CONFIG)
    assert steps_within("euler", 1, False, CONFIG) == 1


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(UserError, match="1 evaluations are too few for one step of 'euler' with guidance"):
        steps_within("euler", 1, True, CONFIG)
