"""The solvers in time against exact solutions, the evaluations that are counted, and samples that are reproducible."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, MIXTURE, NOISE, VP, gaussian

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.loading import load_model
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import VE
from fewstep.samplers import generate
from fewstep.samplers.ddim import ddim
from fewstep.samplers.euler import euler
from fewstep.samplers.generate import GeneratedSet, SampleNoise, integrate
from fewstep.samplers.grids import time_uniform
from fewstep.samplers.heun import heun
from fewstep.samplers.plan import Plan, SamplingConfig
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, STUDENT_SOLVERS, Rule

LABELLED = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6], labels=[0, 1])
TEACHER = Denoiser(MixtureBackbone(LABELLED, FLOW), FLOW, "x0")


def solve(rule: Rule, steps: int, start: float = 0.95, end: float = 0.1) -> Tensor:
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()
    return rule(Predictor(Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0"), Condition()), NOISE, times)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_the_error_falls_with_the_claimed_order(name: str, order: int) -> None:
    """The mean slope over N = 20..160 against 2,000 Heun steps, with the exact velocity of a mixture."""
    reference = solve(heun, 2000)
    errors = [(solve(SOLVERS[name].run, n) - reference).square().mean().sqrt().item() for n in (20, 40, 80, 160)]
    slope = math.log2(errors[0] / errors[-1]) / 3
    assert slope == pytest.approx(order, abs=0.12)


def test_ddim_equals_euler_on_a_rectified_flow() -> None:
    assert torch.allclose(solve(ddim, 7), solve(euler, 7), atol=1e-12)
    from_pure_noise = [rule(Predictor(TEACHER, Condition()), NOISE, time_uniform(5)) for rule in (ddim, euler)]
    assert torch.allclose(*from_pure_noise, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun"])
def test_solvers_converge_to_the_exact_ode_map_of_gaussian_data(name: str) -> None:
    """x_t = alpha_t m + (x_s - alpha_s m) sqrt(v_t / v_s), v = alpha^2 k^2 + sigma^2, here from t = 1 to t = 0."""
    m, k = 0.7, 0.5
    teacher = gaussian(m, k, 2)
    x = SOLVERS[name].run(Predictor(teacher, Condition()), NOISE, time_uniform(400))
    assert torch.allclose(x, m + k * NOISE, atol={"heun": 1e-3}.get(name, 0.02))


def test_ddim_works_on_any_schedule() -> None:
    m, k = 0.7, 0.5
    teacher = Denoiser(MixtureBackbone(GaussianMixture.single(m, k, 2), VP), VP, "x0")
    x = ddim(Predictor(teacher, Condition()), NOISE, time_uniform(800))
    alpha = VP.alpha(torch.ones((), dtype=torch.float64)).item()
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
    assert sum(calls) == predict.nfe * len(NOISE), "the count equals the network's calls"


def test_dynamic_thresholding_clips_and_rescales_only_samples_that_leave_the_range() -> None:
    class OneInRangeOneOut(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return torch.cat([0.5 * torch.ones(1, 100), torch.linspace(-4, 4, 100)[None]])

    predict = Predictor(Denoiser(OneInRangeOneOut(), VP, "x0"), Condition(), threshold=0.9)
    output = predict(torch.zeros(2, 100), 0.5)
    assert torch.equal(output.x0[0], 0.5 * torch.ones(100))
    assert output.x0[1].abs().max() == 1
    assert (output.x0[1].abs() == 1).float().mean() == pytest.approx(0.1, abs=0.02)
    alpha, sigma = predict.nodes([0.5])[0][1:3]
    torch.testing.assert_close(alpha * output.x0 + sigma * output.noise, torch.zeros(2, 100), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["renoise", "deterministic", "euler"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    condition = Condition.of_labels(torch.arange(10) % 2, 2)
    plan = Plan((SOLVERS | STUDENT_SOLVERS)[name], time_uniform(3))

    def run(rows: range, batch: int) -> Tensor:
        part = condition.index(slice(rows.start, rows.stop))
        return integrate(TEACHER, part, (2,), plan=plan, numbers=rows, seed=5, batch=batch).x0

    together = run(range(10), 10)
    assert torch.allclose(together, run(range(10), 3), atol=1e-6)
    assert torch.allclose(together[4:], run(range(4, 10), 100), atol=1e-6)
    assert not torch.allclose(together[:6], together[4:], atol=1e-6)


def test_the_network_and_the_samples_can_be_used_for_training_afterwards() -> None:
    class Linear(nn.Linear):
        def forward(self, x_t: Tensor, t: Tensor | None = None, condition: Condition | None = None) -> Tensor:
            return super().forward(x_t)

    network, plan = Linear(2, 2), Plan(SOLVERS["unipc_2"], time_uniform(3))
    samples = integrate(Denoiser(network, FLOW, "x0"), Condition(), (2,), plan=plan, numbers=range(4)).x0
    assert not samples.is_inference()
    network(samples.requires_grad_()).sum().backward()
    assert network.weight.grad is not None
    assert samples.grad is not None


def test_noise_is_a_function_of_seed_and_number() -> None:
    noise = SampleNoise(0, [0, 1, 2], (4,), torch.device("cpu"))
    a, b = noise(), noise()
    assert not torch.equal(a, b), "every call returns fresh noise"
    assert torch.equal(SampleNoise(0, [2], (4,), torch.device("cpu"))()[0], a[2])
    assert not torch.equal(SampleNoise(1, [2], (4,), torch.device("cpu"))()[0], a[2])


def test_generation_starts_at_the_noise_level_of_its_first_time() -> None:
    """A variance-exploding model starts from noise of its largest sigma, not of 1."""
    denoiser = Denoiser(nn.Identity(), VE(sigma_max=20.0), "x0")
    inputs: list[Tensor] = []
    denoiser.backbone.forward = lambda x_t, t, condition: inputs.append(x_t) or x_t  # type: ignore[func-returns-value]
    plan = Plan(SOLVERS["euler"], (1.0, 0.5))
    integrate(denoiser, Condition(), (2,), plan=plan, numbers=range(2000), batch=2000)
    assert inputs[0].std().item() == pytest.approx(20, rel=0.05)


def test_progress_counts_images_over_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PART", 4)
    done: list[int] = []
    images = GeneratedSet(load_model("fashion"), SamplingConfig("euler", 1), 10, progress=done.append)
    assert sum(len(part) for part in images.parts()) == 10
    assert done == [4, 8, 10]
