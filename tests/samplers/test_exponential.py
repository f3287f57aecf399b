"""The deterministic solvers against closed forms and against each other."""

from __future__ import annotations

import math
from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor, nn
from worlds import HIGH, LOW, NOISE, VP, by_log_snr, mixture

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.prediction import Kind
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from fewstep.samplers.ddim import ddim
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import multistep_pp, pp_steps, singlestep_pp
from fewstep.samplers.euler import euler
from fewstep.samplers.exponential import exponential_integrals, form_integrals, solve_weights
from fewstep.samplers.grids import End, Node, grid
from fewstep.samplers.heun import heun_edm
from fewstep.samplers.multistep import Step, multistep, states
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, Rule
from fewstep.samplers.unipc import unipc, unipc_steps


class Polynomial(nn.Module):
    """A model whose x0 (or noise) is a polynomial of log-SNR and does not depend on x."""

    def __init__(self, coefficients: list[float], schedule: NoiseSchedule) -> None:
        super().__init__()
        self.coefficients, self.schedule = coefficients, schedule

    def at(self, log_snr: float) -> float:
        return sum(c * log_snr**k for k, c in enumerate(self.coefficients))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(x_t, self.at(self.schedule.log_snr(t)[0].item()))


# --- coefficients -----------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 12.0))
def test_the_integrals_equal_numerical_quadrature(h: float) -> None:
    for k, a in enumerate(exponential_integrals(h, 4)):
        exact = quad(lambda r, k=k: math.exp(-(h - r)) * r**k / math.factorial(k), 0, h, epsabs=0, epsrel=1e-12)[0]
        assert a == pytest.approx(exact, rel=1e-9)
    for k, b in enumerate(form_integrals("noise", h, 3)):
        exact = quad(lambda r, k=k: math.exp(h - r) * r**k / math.factorial(k), 0, h, epsabs=0, epsrel=1e-12)[0]
        assert b == pytest.approx(exact, rel=1e-9)
    for k, b in enumerate(form_integrals("sde", h, 3)):
        exact = quad(lambda r, k=k: 2 * math.exp(-2 * (h - r)) * r**k / math.factorial(k), 0, h, epsrel=1e-12)[0]
        assert b == pytest.approx(exact, rel=1e-8, abs=1e-14)


@given(st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3), st.floats(0.05, 2.0))
def test_the_weights_integrate_polynomials_exactly(gaps: list[float], h: float) -> None:
    offsets = [0.0, -gaps[0], -gaps[0] - gaps[1], h]
    a = exponential_integrals(h, 4)
    w = solve_weights(a, offsets)
    for k in range(4):
        integral = sum(weight * r**k / math.factorial(k) for weight, r in zip(w, offsets, strict=True))
        assert integral == pytest.approx(a[k], rel=1e-6, abs=1e-9)


# --- exactness --------------------------------------------------------------------------------------------------------

EXACT = {  # the degree of x0 (data forms) or noise (noise forms) in log-SNR that a rule integrates exactly
    "++1": (partial(pp_steps, order=1), "x0", 0),
    "++2M midpoint": (pp_steps, "x0", 0),
    "++2M Taylor": (partial(pp_steps, relaxation="none"), "x0", 1),
    "++3M published": (partial(pp_steps, order=3), "x0", 1),
    "++3M": (partial(pp_steps, order=3, relaxation="none"), "x0", 2),
    "UniPC-2": (partial(unipc_steps, order=2), "x0", 2),
    "UniPC-3": (partial(unipc_steps, order=3), "x0", 3),
}
EXACT_IN_ONE_STEP = {
    "++2S": (singlestep_pp, "x0", 0),
    "DPM-Solver-1": (partial(dpm_solver, order=1), "noise", 0),
    "DPM-Solver-3": (partial(dpm_solver, order=3), "noise", 1),
}


def exact_step(model: Polynomial, kind: str, s: Node, t: Node, x: float) -> float:
    if kind == "x0":
        integral = quad(lambda u: math.exp(u - t.log_snr) * model.at(u), s.log_snr, t.log_snr, epsrel=1e-12)[0]
        return t.sigma / s.sigma * x + t.alpha * integral
    integral = quad(lambda u: math.exp(t.log_snr - u) * model.at(u), s.log_snr, t.log_snr, epsrel=1e-12)[0]
    return t.alpha / s.alpha * x - t.sigma * integral


def polynomial(degree: int, kind: Kind) -> tuple[Polynomial, Predictor]:
    model = Polynomial([0.7, -0.4, 0.3, 0.2][: degree + 1], VP)
    return model, Predictor(Denoiser(model, VP, kind), Condition())


@pytest.mark.parametrize("name", list(EXACT))
def test_a_multistep_rule_is_exact_for_polynomials_of_its_degree(name: str) -> None:
    """In the middle of a run, where the history is full and the lower orders at the ends have no effect."""
    steps, kind, degree = EXACT[name]
    model, predict = polynomial(degree, kind)
    times = by_log_snr(VP, 12)
    nodes = predict.nodes(times)
    path = [torch.zeros(1, 1, dtype=torch.float64)]
    path += states(predict, path[0], times, steps(12))
    for i in range(4, 8):
        exact = exact_step(model, kind, nodes[i], nodes[i + 1], path[i].item())
        assert path[i + 1].item() == pytest.approx(exact, abs=1e-9)


def test_the_sde_rule_without_noise_is_exact_for_linear_polynomials() -> None:
    model, predict = polynomial(1, "x0")
    nodes = predict.nodes(times := by_log_snr(VP, 6))
    path = [torch.ones(1, 1, dtype=torch.float64)]
    path += states(predict, path[0], times, pp_steps(6, 2, "none", "sde"))
    for i in range(1, 5):  # between the first and the last step, which are of order 1
        s, t = nodes[i], nodes[i + 1]
        integral = quad(lambda u, t=t: 2 * math.exp(2 * (u - t.log_snr)) * model.at(u), s.log_snr, t.log_snr)[0]
        factor = t.sigma / s.sigma * math.exp(s.log_snr - t.log_snr)
        assert path[i + 1].item() == pytest.approx(factor * path[i].item() + t.alpha * integral, abs=1e-9)


@pytest.mark.parametrize("name", list(EXACT_IN_ONE_STEP))
def test_a_singlestep_rule_is_exact_for_polynomials_of_its_degree(name: str) -> None:
    rule, kind, degree = EXACT_IN_ONE_STEP[name]
    model, predict = polynomial(degree, kind)
    s, t = predict.nodes(times := by_log_snr(VP, 6)[:2])
    got = rule(predict, torch.zeros(1, 1, dtype=torch.float64), times).item()
    assert got == pytest.approx(exact_step(model, kind, s, t, 0.0), abs=1e-9)


SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": VPLinear(), "flow": RectifiedFlow(), "edm": VE(), "discrete": VPDiscrete.scaled_linear()
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if not solver.noisy])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_solvers_converge_to_the_exact_ode_map_of_gaussian_data(name: str, schedule: NoiseSchedule) -> None:
    """x_t = alpha_t m + (x_s - alpha_s m) sqrt(v_t / v_s), v = alpha^2 k^2 + sigma^2."""
    m, k = 0.7, 0.5
    model = MixtureBackbone(GaussianMixture.single(m, k, 2), schedule)
    predict = Predictor(Denoiser(model, schedule, "x0"), Condition())
    times = by_log_snr(schedule, 200, -2.5, 3.5)
    s, t = predict.nodes([times[0], times[-1]])
    x = s.alpha * m + math.hypot(s.alpha * k, s.sigma) * NOISE
    exact = t.alpha * m + (x - s.alpha * m) * math.hypot(t.alpha * k, t.sigma) / math.hypot(s.alpha * k, s.sigma)
    got = SOLVERS[name](predict, x, times, lambda: torch.randn_like(x))
    coarse = {"euler": 5, "heun": 5, "deis_2": 3, "deis_3": 3}.get(name, 1)  # in time, the nodes are far from uniform
    assert (got - exact).abs().max() < coarse * (0.02 if SOLVERS[name].order == 1 else 2e-4)


SLOPES: dict[str, tuple[Rule, float]] = {
    "ddim": (ddim, 1), "++1": (partial(multistep_pp, order=1), 1), "++2M": (multistep_pp, 2),
    "++2M Taylor": (partial(multistep_pp, relaxation="none"), 2), "++2S": (singlestep_pp, 2), "heun": (heun_edm, 2),
    "DPM-Solver-2": (partial(dpm_solver, order=2), 2), "DPM-Solver-3": (partial(dpm_solver, order=3), 3),
    "UniP-2": (partial(unipc, correct=False), 2), "UniPC-2": (unipc, 3),
    "++3M published": (partial(multistep_pp, order=3), 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return dpm_solver(mixture(), NOISE, by_log_snr(VP, 1500), order=3)


@pytest.mark.parametrize("name", list(SLOPES))
def test_the_error_falls_with_the_claimed_order(name: str, truth: Tensor) -> None:
    rule, order = SLOPES[name]
    errors = [(rule(mixture(), NOISE, by_log_snr(VP, n)) - truth).square().mean().sqrt().item() for n in (20, 40, 80)]
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(order, abs=0.16)


@pytest.mark.parametrize(("published", "order"), [(True, 2), (False, 3)])
def test_3m_is_of_order_2_as_published_and_of_order_3_with_exact_integrals(
    published: bool, order: int, truth: Tensor
) -> None:
    """Three steps at either end are divided by 30, so that their lower order has no effect."""
    errors = []
    for n in (20, 40, 80):
        step = (HIGH - LOW) / n
        ends = torch.linspace(0, 3 * step, 91)
        log_snr = torch.cat([LOW + ends, torch.linspace(LOW + 4 * step, HIGH, n - 3), HIGH - ends[:-1].flip(0)])
        times = VP.time_of_log_snr(log_snr.double().unique()).flip(0).sort(descending=True).values.tolist()
        relaxation = "published" if published else "none"
        got = multistep(mixture(), NOISE, times, [Step(3, "data", relaxation)] * (len(times) - 1))
        errors.append((got - truth).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(order, abs=0.35)


def test_all_rules_of_first_order_agree() -> None:
    for schedule in (VP, RectifiedFlow(), VE()):
        times = by_log_snr(schedule, 7)
        got = ddim(mixture(schedule), NOISE, times)
        for rule in (
            partial(multistep_pp, order=1),
            partial(dpm_solver, order=1),
            partial(unipc, order=1, correct=False),
        ):
            torch.testing.assert_close(rule(mixture(schedule), NOISE, times), got, rtol=1e-10, atol=1e-10)
    flow = RectifiedFlow()
    times = grid(flow, 6)
    torch.testing.assert_close(euler(mixture(flow), NOISE, times), ddim(mixture(flow), NOISE, times))


def test_known_names_give_their_rules() -> None:
    times, noise = by_log_snr(VP, 6), lambda: NOISE
    for name, rule in (
        ("res_multistep", partial(multistep_pp, relaxation="none")),
        ("unipc_2_bh1", partial(unipc, variant="bh1")),
        ("unipc_3_bh1", partial(unipc, order=3, variant="bh1")),
        ("unipc_3", partial(unipc, order=3)),
    ):
        assert torch.equal(SOLVERS[name](mixture(), NOISE, times, noise), rule(mixture(), NOISE, times))
    for order in (2, 3):
        bh1 = unipc(mixture(), NOISE, times, order=order, variant="bh1")
        assert not torch.equal(bh1, unipc(mixture(), NOISE, times, order=order))


def test_unip_2_equals_2m() -> None:
    times = by_log_snr(VP, 8)
    torch.testing.assert_close(
        unipc(mixture(), NOISE, times, correct=False), multistep_pp(mixture(), NOISE, times), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("end", get_args(End))
def test_the_first_and_last_of_a_thousand_steps_stay_finite(name: str, schedule: NoiseSchedule, end: End) -> None:
    """The steps in between are longer than the last ones, and later than the first ones."""
    times = grid(schedule, 1000, "karras", end=end, t_max=0.999)
    for some in (times[:40], times[-40:]):
        x = SOLVERS[name](mixture(schedule), NOISE[:4], some, lambda: torch.randn_like(NOISE[:4]))
        assert x.isfinite().all()


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_thousand_steps_stay_finite(name: str) -> None:
    times = grid(VP, 1000, "karras", t_max=0.999)
    x = SOLVERS[name](mixture(VP), NOISE[:4], times, lambda: torch.randn_like(NOISE[:4]))
    assert x.isfinite().all()


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("euler", "heun")])
def test_one_step_from_pure_noise_of_a_flow_gives_the_predicted_x0(name: str) -> None:
    """alpha = 0 at the start and sigma = 0 at the end: every rule is of first order there."""
    flow = RectifiedFlow()
    x = SOLVERS[name](mixture(flow), NOISE, (1.0, 0.0), lambda: torch.zeros_like(NOISE))
    torch.testing.assert_close(x, mixture(flow)(NOISE, 1.0).x0)
