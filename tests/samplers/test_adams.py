"""DEIS, iPNDM, gradient estimation and RES: exactness, orders, the papers' equations and diffusers' classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn
from worlds import HIGH, LOW, NOISE, VP, by_log_snr, mixture

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from fewstep.samplers.ddim import ddim
from fewstep.samplers.deis import adams_bashforth_weights, deis
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import singlestep_pp
from fewstep.samplers.grids import Node
from fewstep.samplers.ipndm import combine_noise, gradient_estimation, ipndm
from fewstep.samplers.multistep import Step, falling_orders, multistep
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, Rule

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": VPLinear(), "flow": RectifiedFlow(), "edm": VE(), "discrete": VPDiscrete.scaled_linear()
}  # fmt: skip
LABELLED = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6], labels=[0, 1])


def rho(node: Node) -> float:
    return node.sigma / node.alpha


class NoiseCurve(nn.Module):
    """A model whose predicted noise is ``a + b u + c u^2 + d u^3`` of ``u(t)``, whatever x."""

    def __init__(self, coefficients: list[float], u: Any) -> None:
        super().__init__()
        self.coefficients, self.u = coefficients, u

    def at(self, t: float) -> float:
        return sum(c * self.u(t) ** k for k, c in enumerate(self.coefficients))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(x_t, self.at(t[0].item()))


def along(rule: Rule, predict: Predictor, times: list[float]) -> list[float]:
    """y = x / alpha at all ``times``."""
    values = [0.0]
    for k in range(2, len(times) + 1):
        values.append(rule(predict, torch.zeros(1, 1, dtype=torch.float64), times[:k]).item())
    return [x / node.alpha for x, node in zip(values, predict.nodes(times), strict=True)]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_deis_is_exact_for_noise_that_is_a_polynomial_of_time(order: int, schedule: NoiseSchedule) -> None:
    """On any grid: y_t - y_s = int e d(sigma / alpha), here with the integral by scipy."""
    model = NoiseCurve([0.7, -0.4, 0.9][:order], lambda t: t)
    predict = Predictor(Denoiser(model, schedule, "noise"), Condition())
    times = [0.9, 0.8, 0.55, 0.4, 0.32, 0.1]
    y, nodes = along(partial(deis, order=order), predict, times), predict.nodes(times)
    for i in range(2, 5):  # where the history is full
        s, t = times[i], times[i + 1]
        curve = quad(lambda t: rho(predict.nodes([t])[0]) * derivative(model, t), s, t, epsabs=1e-11, limit=400)[0]
        exact = rho(nodes[i + 1]) * model.at(t) - rho(nodes[i]) * model.at(s) - curve
        assert y[i + 1] - y[i] == pytest.approx(exact, rel=1e-4 if isinstance(schedule, VPDiscrete) else 1e-8)


def derivative(model: NoiseCurve, t: float) -> float:
    return (model.at(t + 1e-5) - model.at(t - 1e-5)) / 2e-5  # exact for a parabola


def test_deis_weights_integrate_the_lagrange_polynomials() -> None:
    past, end = (0.6, 0.75, 0.9), 0.45
    for schedule in (VPLinear(), RectifiedFlow()):

        def slope(t: float, schedule: NoiseSchedule = schedule) -> float:
            at = torch.tensor(t, dtype=torch.float64)
            alpha, sigma = schedule.alpha(at), schedule.sigma(at)
            return ((schedule.d_sigma(at) * alpha - sigma * schedule.d_alpha(at)) / alpha**2).item()

        weights = adams_bashforth_weights(schedule, past, end)
        for j, time in enumerate(past):
            others = [t for t in past if t != time]

            def integrand(t: float, time: float = time, others: list[float] = others) -> float:
                return math.prod((t - other) / (time - other) for other in others) * slope(t)

            assert weights[j] == pytest.approx(quad(integrand, past[0], end, epsabs=1e-12)[0], rel=1e-9)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_is_exact_for_polynomials_of_sigma_by_alpha_on_equal_steps(order: int) -> None:
    model = NoiseCurve([0.7, -0.4, 0.9, 0.5][:order], lambda t: t / (1 - t))
    predict = Predictor(Denoiser(model, RectifiedFlow(), "noise"), Condition())
    levels = torch.linspace(3.0, 0.6, 9, dtype=torch.float64)
    y = along(partial(ipndm, order=order), predict, (levels / (1 + levels)).tolist())
    for i in range(order - 1, 8):
        exact = quad(lambda u: model.at(u / (1 + u)), levels[i], levels[i + 1])[0]
        assert y[i + 1] - y[i] == pytest.approx(exact, rel=1e-9)
    assert y[1] - y[0] == pytest.approx(-0.3 * model.at(0.75)), "the first step is Euler's"


def test_gradient_estimation_extrapolates_the_noise_by_gamma() -> None:
    """Its equation by hand: e = gamma e_i + (1 - gamma) e_(i-1), y += (rho_t - rho_s) e."""
    times = [0.8, 0.6, 0.45]
    a, b, c = mixture().nodes(times)
    first = mixture()(NOISE, a.t).noise
    x = b.alpha * (NOISE / a.alpha + (rho(b) - rho(a)) * first)
    second = mixture()(x, b.t).noise
    expected = c.alpha * (x / b.alpha + (rho(c) - rho(b)) * (2 * second - first))
    torch.testing.assert_close(SOLVERS["gradient_estimation"].run(mixture(), NOISE, times), expected)
    times = by_log_snr(VP, 7)
    for gamma, rule in ((1.0, ddim), (1.5, partial(ipndm, order=2))):
        torch.testing.assert_close(
            gradient_estimation(mixture(), NOISE, times, gamma=gamma), rule(mixture(), NOISE, times)
        )


def test_every_prediction_has_a_weight() -> None:
    with pytest.raises(ValueError, match="longer"):
        combine_noise(mixture(), NOISE, [0.8, 0.6, 0.45], ((1,), (1,)))


def test_deis_2_combines_two_predictions_by_their_weights() -> None:
    times = (0.9, 0.75, 0.6, 0.45)
    before, (_, _, s, t) = deis(mixture(), NOISE, times[:3], order=2), mixture().nodes(times)
    old = mixture()(deis(mixture(), NOISE, times[:2], order=2), times[1]).noise
    new = mixture()(before, times[2]).noise
    a, b = adams_bashforth_weights(VP, (times[2], times[1]), times[3])
    expected = t.alpha * (before / s.alpha + a * new + b * old)
    torch.testing.assert_close(deis(mixture(), NOISE, times, order=2), expected)


def test_res_2s_takes_the_papers_weights() -> None:
    """a21 = c2 phi1(-c2 h), b2 = phi2(-h) / c2, b1 = phi1(-h) - b2 with c2 = 1/2 (times h)."""
    predict, times = mixture(), by_log_snr(VP, 5)[:2]
    s, t = predict.nodes(times)
    h = t.log_snr - s.log_snr
    middle = predict.nodes(VP.time_of_log_snr(torch.tensor([s.log_snr + h / 2], dtype=torch.float64)).tolist())[0]
    first = predict(NOISE, s.t).x0
    x = math.exp(-h / 2) * NOISE / s.alpha + (1 - math.exp(-h / 2)) * first
    second = predict(middle.alpha * x, middle.t).x0
    b2 = 2 * (math.exp(-h) - 1 + h) / h
    expected = t.alpha * (math.exp(-h) * NOISE / s.alpha + (1 - math.exp(-h) - b2) * first + b2 * second)
    got = SOLVERS["res_2s"].run(predict, NOISE, times)
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, singlestep_pp(predict, NOISE, times))


# --- orders -----------------------------------------------------------------------------------------------------------

ORDERS: dict[str, tuple[Rule, float]] = {
    "deis_2": (partial(deis, order=2), 2), "deis_3": (deis, 3), "ipndm": (ipndm, 2),
    "res_2s": (SOLVERS["res_2s"].run, 2), "gradient_estimation": (gradient_estimation, 1),
}  # fmt: skip


def world(guidance: float) -> Predictor:
    if guidance == 1:
        return mixture()
    condition = Condition.of_labels(torch.arange(len(NOISE)) % 2, 2)
    return Predictor(Denoiser(MixtureBackbone(LABELLED, VP), VP, "x0"), condition, Guidance(guidance))


@pytest.fixture(scope="module", params=[1.0, 2.0])
def problem(request: pytest.FixtureRequest) -> tuple[float, Tensor]:
    """A guidance scale, and the solution."""
    return request.param, dpm_solver(world(request.param), NOISE, by_log_snr(VP, 600), order=3)


@pytest.mark.parametrize("name", list(ORDERS))
def test_the_error_falls_with_the_claimed_order(name: str, problem: tuple[float, Tensor]) -> None:
    """Three steps at the start are divided by 30, so that their lower order has no effect."""
    rule, order = ORDERS[name]
    assert SOLVERS[name].order == order
    errors = []
    for n in (40, 80, 160):
        step = (HIGH - LOW) / n
        log_snr = torch.cat([LOW + torch.linspace(0, 3 * step, 91)[:-1], torch.linspace(LOW + 3 * step, HIGH, n - 2)])
        got = rule(world(problem[0]), NOISE, VP.time_of_log_snr(log_snr.double()).tolist())
        errors.append((got - problem[1]).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(order, abs=0.3)


# --- diffusers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearLogSnr(VPLinear):
    """A VP schedule whose log-SNR is 4 - 8 t, so that polynomials of time and of log-SNR are the same."""

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log1p(torch.exp(2 * (8 * t - 4)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -8 * self.alpha(t) * self.sigma(t) ** 2

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (4 - log_snr) / 8


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_equals_diffusers_where_time_is_linear_in_log_snr(order: int) -> None:
    """diffusers interpolates in log(sigma / alpha), which is also this package's noise form."""
    diffusers = pytest.importorskip("diffusers")
    schedule, times = LinearLogSnr(), torch.linspace(0.9, 0.2, 21, dtype=torch.float64).tolist()
    predict = mixture(schedule)
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, prediction_type="sample")
    scheduler.set_timesteps(20)
    scheduler.sigmas = torch.tensor([rho(node) for node in predict.nodes(times)], dtype=torch.float64)
    x = NOISE
    for t, label in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(predict(x, t).x0, label, x).prev_sample
    got = deis(mixture(schedule), NOISE, times, order=order)
    torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-7)
    steps = [Step(order, "noise", "none")] * 20
    torch.testing.assert_close(got, multistep(mixture(schedule), NOISE, times, steps), rtol=1e-7, atol=1e-7)
    if order > 1:
        uneven = by_log_snr(VP, 20)
        other = multistep(mixture(), NOISE, uneven, [Step(p, "noise", "none") for p in falling_orders(order, 20)])
        assert not torch.allclose(deis(mixture(), NOISE, uneven, order=order), other, atol=1e-4)


def test_ipndm_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    predict, times = mixture(), by_log_snr(VP, 12)
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(12)
    nodes = predict.nodes(times)
    scheduler.alphas = torch.tensor([node.alpha for node in nodes], dtype=torch.float64)
    scheduler.betas = torch.tensor([node.sigma for node in nodes], dtype=torch.float64)
    x = NOISE
    for node, label in zip(nodes, scheduler.timesteps, strict=False):
        x = scheduler.step(predict(x, node.t).view("v"), label, x).prev_sample
    torch.testing.assert_close(SOLVERS["ipndm"].run(mixture(), NOISE, times), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["deis_2", "deis_3", "ipndm", "gradient_estimation"])
def test_the_step_to_clean_data_returns_the_predicted_x0(name: str) -> None:
    flow, times = RectifiedFlow(), [0.9, 0.7, 0.5, 0.3, 0.0]
    before = SOLVERS[name].run(mixture(flow), NOISE, times[:-1])
    torch.testing.assert_close(SOLVERS[name].run(mixture(flow), NOISE, times), mixture(flow)(before, 0.3).x0)
