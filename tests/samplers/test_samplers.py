"""The samplers against exact solutions, and what they count."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import FLOW, gaussian

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.model_config import FewStep, ModelConfig
from fewstep.models.schedules import VPLinear
from fewstep.samplers.ddim import ddim
from fewstep.samplers.euler import euler
from fewstep.samplers.few_step import renoise
from fewstep.samplers.generate import SampleNoise, plan, sample, steps_within
from fewstep.samplers.grids import grid, time_uniform
from fewstep.samplers.heun import heun
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, STUDENTS, Rule

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6], labels=[0, 1])
TEACHER = Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0")
TEACHER_CONFIG = ModelConfig(backbone={"name": "unet"}, shape=(2,))
NOISE = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solve(solver: Rule, steps: int, start: float = 0.95, end: float = 0.1) -> Tensor:
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    return solver(Predictor(TEACHER, Condition()), NOISE, times)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_error_falls_with_the_claimed_order(name: str, order: int) -> None:
    """Mean slope over N = 20..160 against 2,000 Heun steps, on the exact field of a mixture."""
    reference = solve(heun, 2000)
    errors = [(solve(SOLVERS[name].run, n) - reference).square().mean().sqrt().item() for n in (20, 40, 80, 160)]
    slope = math.log2(errors[0] / errors[-1]) / 3
    assert slope == pytest.approx(order, abs=0.12)


def test_ddim_is_euler_on_a_rectified_flow() -> None:
    assert torch.allclose(solve(ddim, 7), solve(euler, 7), atol=1e-12)
    whole = [solver(Predictor(TEACHER, Condition()), NOISE, time_uniform(5)) for solver in (ddim, euler)]
    assert torch.allclose(*whole, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun"])
def test_gaussian_data_reach_their_exact_ode_map(name: str) -> None:
    """x_t = alpha_t m + (x_s - alpha_s m) sqrt(v_t / v_s), v = alpha^2 k^2 + sigma^2, here from t = 1 to t = 0."""
    m, k = 0.7, 0.5
    teacher = gaussian(m, k, 2)
    x = SOLVERS[name].run(Predictor(teacher, Condition()), NOISE, time_uniform(400))
    assert torch.allclose(x, m + k * NOISE, atol={"heun": 1e-3}.get(name, 0.02))


def test_ddim_serves_any_schedule() -> None:
    m, k, schedule = 0.7, 0.5, VPLinear()
    teacher = Denoiser(MixtureBackbone(GaussianMixture.single(m, k, 2), schedule), schedule, "x0")
    x = ddim(Predictor(teacher, Condition()), NOISE, time_uniform(800))
    alpha = schedule.alpha(torch.ones((), dtype=torch.float64)).item()
    exact = m + (NOISE - alpha * m) * k / math.sqrt(alpha**2 * k**2 + 1 - alpha**2)
    assert torch.allclose(x, exact, atol=0.02)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 6), ("ddim", 6), ("heun", 11)])
@pytest.mark.parametrize("guided", [1, 2])
def test_network_evaluations_are_counted_and_guidance_doubles_them(name: str, evaluations: int, guided: int) -> None:
    condition = Condition.of_labels(torch.zeros(200, dtype=torch.long), 2)
    predict = Predictor(TEACHER, condition, Guidance(1.0 if guided == 1 else 2.0))
    calls: list[int] = []
    handle = TEACHER.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    SOLVERS[name].run(predict, NOISE, time_uniform(6))
    handle.remove()
    assert predict.nfe == guided * evaluations
    assert sum(calls) == predict.nfe * len(NOISE), "what is counted is what the network did"


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_with_the_exact_endpoint_map_keeps_the_data(steps: int) -> None:
    """If the student's x0 is the end of the teacher's ODE, every grid gives N(m, k^2) again."""
    m, k, n = 0.7, 0.5, 200_000

    class Endpoint(torch.nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            v = ((1 - t) ** 2 * k**2 + t**2)[:, None]
            return m + (x_t - (1 - t)[:, None] * m) * k / v.sqrt()

    generator = torch.Generator().manual_seed(0)
    student = Predictor(Denoiser(Endpoint(), FLOW, "x0"), Condition())

    def noise() -> Tensor:
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    x = renoise(student, noise(), time_uniform(steps), noise)
    assert x.mean().item() == pytest.approx(m, abs=5e-3)
    assert x.std().item() == pytest.approx(k, abs=5e-3)
    assert student.nfe == steps


def test_grids() -> None:
    assert time_uniform(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert time_uniform(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    times = grid(FLOW, 6, "log_snr", most=0.95, least=0.05)
    assert (times[0], times[-1]) == (0.95, 0.0)
    steps = FLOW.log_snr(torch.tensor(times[:-1], dtype=torch.float64)).diff()
    assert torch.allclose(steps, torch.full_like(steps, 2 * math.log(19) / 6))
    with pytest.raises(ValueError, match="at least one step"):
        time_uniform(0)


@pytest.mark.parametrize("rule", ["renoise", "deterministic", "euler"])
def test_a_sample_does_not_depend_on_its_batch(rule: str) -> None:
    condition = Condition.of_labels(torch.arange(10) % 2, 2)
    teacher = Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0")
    random = [
        sample(
            teacher, condition, (2,), 10, rule=(SOLVERS | STUDENTS)[rule], times=time_uniform(3), seed=5, batch=batch
        ).x0
        for batch in (10, 3)
    ]
    assert torch.allclose(*random, atol=1e-6)
    later = condition.index(slice(4, 10))
    assert torch.allclose(
        sample(
            teacher,
            later,
            (2,),
            6,
            rule=(SOLVERS | STUDENTS)[rule],
            times=time_uniform(3),
            seed=5,
            numbers=range(4, 10),
        ).x0,
        random[0][4:],
        atol=1e-6,
    )


def test_sampling_leaves_a_network_and_samples_that_can_be_trained_with() -> None:
    network = torch.nn.Linear(2, 2)
    denoiser = Denoiser(Progress(network), FLOW, "x0")
    drawn = sample(denoiser, Condition(), (2,), 4, rule=SOLVERS["unipc_2"], times=time_uniform(3)).x0
    assert not drawn.is_inference()
    network(drawn.requires_grad_()).sum().backward()
    assert network.weight.grad is not None
    assert drawn.grad is not None


class Progress(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(x_t)


def test_noise_belongs_to_seed_and_number() -> None:
    first = SampleNoise(0, [0, 1, 2], (4,), torch.device("cpu"))
    a, b = first(), first()
    assert not torch.equal(a, b), "a second draw is fresh"
    assert torch.equal(SampleNoise(0, [2], (4,), torch.device("cpu"))()[0], a[2])
    assert not torch.equal(SampleNoise(1, [2], (4,), torch.device("cpu"))()[0], a[2])


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("nfe", [2, 3, 4, 7, 8, 33])
def test_the_most_steps_within_a_number_of_evaluations(solver: str, scale: float, nfe: int) -> None:
    def cost(steps: int) -> int:
        condition = Condition.of_labels(torch.zeros(1, dtype=torch.long), 2)
        rule, times = plan(solver, steps, TEACHER_CONFIG)
        return sample(TEACHER, condition, (2,), 1, rule=rule, times=times, guidance=Guidance(scale)).nfe

    steps = steps_within(solver, nfe, scale != 1, TEACHER_CONFIG)
    assert cost(steps) <= nfe < cost(steps + 1)


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(UserError, match="1 evaluations are too few for one step of 'euler' with guidance"):
        steps_within("euler", 1, True, TEACHER_CONFIG)


def test_plan() -> None:
    def student(**few: Any) -> ModelConfig:
        return TEACHER_CONFIG.model_copy(update={"few_step": FewStep(rule="renoise", **few)})

    renoise, few = STUDENTS["renoise"], student(times=(1.0, 0.6))
    assert plan("student", None, few) == (renoise, (1.0, 0.6, 0.0))
    assert plan("student", 4, few) == (renoise, time_uniform(4))
    shifted = student(times=time_uniform(4, 3.0)[:-1], shift=3.0)
    assert plan("student", 2, shifted) == (renoise, time_uniform(2, 3.0))
    assert plan("euler", 3, few) == (SOLVERS["euler"], time_uniform(3))
    rule, times = plan("dpmpp_2m", 5, TEACHER_CONFIG, "log_snr:0.02")
    assert rule == SOLVERS["dpmpp_2m"]
    assert (times[0], times[-1], len(times)) == (0.999, 0.0, 6)


FEW = TEACHER_CONFIG.model_copy(update={"few_step": FewStep(rule="renoise", times=(1.0, 0.6))})


@pytest.mark.parametrize(
    ("solver", "steps", "config", "settings", "message"),
    [
        ("student", 4, TEACHER_CONFIG, {}, "no distilled student"),
        ("eular", 4, TEACHER_CONFIG, {}, "did you mean 'euler'"),
        ("euler", None, TEACHER_CONFIG, {}, "needs a number of steps"),
        ("euler", 0, TEACHER_CONFIG, {}, "at least 1, got 0"),
        ("euler", 4, TEACHER_CONFIG, {"spacing": "karas"}, "did you mean 'karras'"),
        ("euler", 4, TEACHER_CONFIG, {"spacing": "karras:2"}, "does not work"),
        ("euler", 4, TEACHER_CONFIG, {"spacing": "karras:x"}, "does not work"),
        ("euler", 4, TEACHER_CONFIG, {"spacing": "time:0.02"}, "takes no least time"),
        ("dpm_solver_v3_2", 4, TEACHER_CONFIG, {}, "fewstep ems"),
        ("dc_solver_2", 4, TEACHER_CONFIG, {}, "fewstep ratios"),
        ("student", None, FEW, {"guidance": 2.0}, "has its guidance in its weights"),
        ("student", 4, FEW, {"spacing": "karras"}, "sampled at its own times"),
        ("unipc_2", 4, FEW, {}, "choose student, euler or ddim"),
    ],
)
def test_what_does_not_go_together_is_refused(
    solver: str, steps: int | None, config: ModelConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(solver, steps, config, **settings)


def test_a_grid_of_beta_quantiles_says_that_it_needs_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"grid 'beta' does not work: its quantiles need scipy: pip install"):
        plan("euler", 4, TEACHER_CONFIG, "beta")
