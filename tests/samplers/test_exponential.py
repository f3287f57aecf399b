"""The exponential integrators against closed forms, against each other, and against diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, get_args

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
from fewstep.samplers.dc_solver import Cascade, dc_solver, golden, search, shifted
from fewstep.samplers.ddim import ddim
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import multistep_pp, pp_steps, singlestep_pp
from fewstep.samplers.euler import euler
from fewstep.samplers.exponential import HistoryEntry, integrals_of_form, moments, weights
from fewstep.samplers.grids import End, Node, checked, grid
from fewstep.samplers.heun import Churn, heun_edm
from fewstep.samplers.multistep import Step, multistep, states
from fewstep.samplers.predictor import ModelOutput, Predictor
from fewstep.samplers.solvers import SOLVERS, Rule
from fewstep.samplers.unipc import unipc, unipc_steps


class Polynomial(nn.Module):
    """A model whose x0 (or noise) is a polynomial of log-SNR, whatever x is."""

    def __init__(self, coefficients: list[float], schedule: NoiseSchedule) -> None:
        super().__init__()
        self.coefficients, self.schedule = coefficients, schedule

    def at(self, log_snr: float) -> float:
        return sum(c * log_snr**k for k, c in enumerate(self.coefficients))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(x_t, self.at(self.schedule.log_snr(t)[0].item()))


# --- coefficients -----------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 12.0))
def test_moments_are_the_integrals(h: float) -> None:
    for k, a in enumerate(moments(h, 4)):
        exact = quad(lambda r, k=k: math.exp(-(h - r)) * r**k / math.factorial(k), 0, h, epsabs=0, epsrel=1e-12)[0]
        assert a == pytest.approx(exact, rel=1e-9)
    for k, b in enumerate(integrals_of_form("noise", h, 3)):
        exact = quad(lambda r, k=k: math.exp(h - r) * r**k / math.factorial(k), 0, h, epsabs=0, epsrel=1e-12)[0]
        assert b == pytest.approx(exact, rel=1e-9)
    for k, b in enumerate(integrals_of_form("sde", h, 3)):
        exact = quad(lambda r, k=k: 2 * math.exp(-2 * (h - r)) * r**k / math.factorial(k), 0, h, epsrel=1e-12)[0]
        assert b == pytest.approx(exact, rel=1e-8, abs=1e-14)


@given(st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3), st.floats(0.05, 2.0))
def test_weights_integrate_polynomials_exactly(gaps: list[float], h: float) -> None:
    offsets = [0.0, -gaps[0], -gaps[0] - gaps[1], h]
    a = moments(h, 4)
    w = weights(a, offsets)
    for k in range(4):
        assert sum(share * r**k / math.factorial(k) for share, r in zip(w, offsets, strict=True)) == pytest.approx(
            a[k], rel=1e-6, abs=1e-9
        )


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
    """In the middle of a walk, where it has all the values it wants and lower orders at the ends do not show."""
    steps, kind, degree = EXACT[name]
    model, predict = polynomial(degree, kind)
    times = by_log_snr(VP, 12)
    nodes = predict.nodes(times)
    walk = [torch.zeros(1, 1, dtype=torch.float64)]
    walk += states(predict, walk[0], times, steps(12))
    for i in range(4, 8):
        reached = exact_step(model, kind, nodes[i], nodes[i + 1], walk[i].item())
        assert walk[i + 1].item() == pytest.approx(reached, abs=1e-9)


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
@pytest.mark.parametrize("world", list(SCHEDULES))
def test_gaussian_data_reach_their_exact_ode_map(name: str, world: str) -> None:
    """x_t = alpha_t m + (x_s - alpha_s m) sqrt(v_t / v_s), v = alpha^2 k^2 + sigma^2."""
    m, k, schedule = 0.7, 0.5, SCHEDULES[world]
    model = MixtureBackbone(GaussianMixture.single(m, k, 2), schedule)
    predict = Predictor(Denoiser(model, schedule, "x0"), Condition())
    times = by_log_snr(schedule, 200, -2.5, 3.5)
    s, t = predict.nodes([times[0], times[-1]])
    x = s.alpha * m + math.hypot(s.alpha * k, s.sigma) * NOISE
    exact = t.alpha * m + (x - s.alpha * m) * math.hypot(t.alpha * k, t.sigma) / math.hypot(s.alpha * k, s.sigma)
    got = SOLVERS[name](predict, x, times, lambda: torch.randn_like(x))
    coarse = 5 if name in ("euler", "heun") else 1  # in time, where these nodes are far from uniform
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
def test_3m_is_of_order_3_with_the_whole_second_difference_and_2_as_published(
    published: bool, order: int, truth: Tensor
) -> None:
    """Without the warm-up's and the last steps' own error: these are three, and made 30 times as short."""
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


def test_all_rules_of_first_order_are_one() -> None:
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


def test_unip_2_is_2m_and_a_ratio_of_one_is_unipc() -> None:
    times = by_log_snr(VP, 8)
    torch.testing.assert_close(
        unipc(mixture(), NOISE, times, correct=False), multistep_pp(mixture(), NOISE, times), rtol=1e-12, atol=1e-12
    )
    for order in (2, 3):
        a = dc_solver(mixture(), NOISE, times, [1.0] * 8, order=order)
        assert torch.equal(a, unipc(mixture(), NOISE, times, order=order))


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("world", list(SCHEDULES))
@pytest.mark.parametrize("end", get_args(End))
def test_a_thousand_steps_stay_finite(name: str, world: str, end: End) -> None:
    schedule = SCHEDULES[world]
    times = grid(schedule, 1000, "karras", end=end, most=0.999)
    x = SOLVERS[name](mixture(schedule), NOISE[:4], times, lambda: torch.randn_like(NOISE[:4]))
    assert x.isfinite().all()


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("euler", "heun")])
def test_one_step_from_pure_noise_of_a_flow_gives_the_predicted_x0(name: str) -> None:
    """alpha = 0 at the start and sigma = 0 at the end: every rule is of first order there."""
    flow = RectifiedFlow()
    x = SOLVERS[name](mixture(flow), NOISE, (1.0, 0.0), lambda: torch.zeros_like(NOISE))
    torch.testing.assert_close(x, mixture(flow)(NOISE, 1.0).x0)


# --- stochastic rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sde_dpmpp_1", "sde_dpmpp_2m", "ddpm"])
def test_stochastic_rules_keep_the_variance_of_gaussian_data(name: str) -> None:
    m, k, n = 0.4, 0.6, 100_000
    predict = Predictor(Denoiser(MixtureBackbone(GaussianMixture.single(m, k, 1), VP), VP, "x0"), Condition())
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    s = predict.nodes(times := by_log_snr(VP, 400, -3, 3))[0]
    t = predict.nodes(times)[-1]
    x = SOLVERS[name](predict, s.alpha * m + math.hypot(s.alpha * k, s.sigma) * noise(), times, noise)
    assert x.mean().item() == pytest.approx(t.alpha * m, abs=0.01)
    assert x.std().item() == pytest.approx(math.hypot(t.alpha * k, t.sigma), rel=0.015)


def test_without_noise_the_sde_rule_is_its_integral() -> None:
    model, predict = polynomial(1, "x0")
    nodes = predict.nodes(times := by_log_snr(VP, 6))
    walk = [torch.ones(1, 1, dtype=torch.float64)]
    walk += states(predict, walk[0], times, pp_steps(6, 2, "none", "sde"))
    for i in range(1, 5):  # between the first and the last step, which are of order 1
        s, t = nodes[i], nodes[i + 1]
        integral = quad(lambda u, t=t: 2 * math.exp(2 * (u - t.log_snr)) * model.at(u), s.log_snr, t.log_snr)[0]
        kept = t.sigma / s.sigma * math.exp(s.log_snr - t.log_snr)
        assert walk[i + 1].item() == pytest.approx(kept * walk[i].item() + t.alpha * integral, abs=1e-9)


def test_churn_adds_what_it_removes() -> None:
    """On Gaussian data the law at the end is the same with churn and without."""
    m, k, n = 0.4, 0.6, 100_000
    predict = Predictor(Denoiser(MixtureBackbone(GaussianMixture.single(m, k, 1), VE()), VE(), "x0"), Condition())
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    start = predict.nodes([1.0])[0].sigma
    times = grid(VE(), 60, "karras")
    x = heun_edm(predict, start * noise(), times, noise, churn=Churn(amount=20, low=0.05, high=50))
    assert x.mean().item() == pytest.approx(m, abs=0.01)
    assert x.std().item() == pytest.approx(k, rel=0.02)


# --- DC-Solver --------------------------------------------------------------------------------------------------------


def test_a_shifted_value_is_the_polynomial_at_the_shifted_time() -> None:
    times = (0.5, 0.7, 0.8)
    nodes = mixture().nodes(times)
    values = [torch.tensor([[2.0 - t + 3 * t * t]], dtype=torch.float64) for t in times]
    known = [HistoryEntry(n, ModelOutput(v, v, "x0", (1.0, 1.0, 0.0, 0.0))) for n, v in zip(nodes, values, strict=True)]
    for rho in (0.0, 0.6, 1.0, 1.7):
        t = rho * 0.5 + (1 - rho) * 0.7
        assert shifted(known, rho).said.x0.item() == pytest.approx(2 - t + 3 * t * t, abs=1e-12)


def test_searched_ratios_bring_every_step_nearer() -> None:
    times = grid(VP, 6, "time", end="minimum", least=0.02)
    fine = [t for a, b in pairwise(times) for t in torch.linspace(a, b, 41).tolist()[:-1]]
    walk = list(states(mixture(), NOISE, [*fine, times[-1]], unipc_steps(240, 3)))
    ratios = search(mixture(), NOISE, times, walk[39::40])
    assert ratios[:2] == [1.0, 1.0]
    assert any(ratio != 1 for ratio in ratios)
    plain, better = (dc_solver(mixture(), NOISE, times, r) for r in ([1.0] * 6, ratios))
    assert (better - walk[-1]).square().mean() < (plain - walk[-1]).square().mean()
    with pytest.raises(ValueError, match="need as many ratios"):
        dc_solver(mixture(), NOISE, times, [1.0])


def test_golden_section_and_the_cascade() -> None:
    assert golden(lambda r: (r - 0.73) ** 2, 0, 2, 30) == pytest.approx(0.73, abs=1e-4)
    truth = Cascade(torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0)).double().numpy())
    searched = {(n, w): truth.ratios(n, w) for n in (5, 8, 12, 20) for w in (1.0, 4.0, 7.5)}
    again = Cascade.fit(searched)
    for key, ratios in searched.items():
        assert again.ratios(*key) == pytest.approx(ratios, abs=1e-6)
    assert again.ratios(10, 3.0) == pytest.approx(truth.ratios(10, 3.0), abs=1e-5)


# --- diffusers --------------------------------------------------------------------------------------------------------


def theirs(scheduler: Any, times: list[float], x: Tensor) -> Tensor:
    """A diffusers scheduler over our nodes, in float64, on the exact x0 of the mixture."""
    predict = mixture(VPDiscrete.scaled_linear())
    nodes = predict.nodes(times)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor([math.exp(-n.log_snr) for n in nodes], dtype=torch.float64)
    for node, label in zip(nodes[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(predict(x, node.t).x0, label, x, return_dict=False)[0]
    return x


COMMON = {"prediction_type": "sample", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIRS: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor]]] = {
    "++1": ("DPMSolverMultistepScheduler", {"solver_order": 1}, partial(multistep_pp, order=1)),
    "++2M midpoint": ("DPMSolverMultistepScheduler", {"solver_order": 2}, multistep_pp),
    "++2M Taylor": (
        "DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"},
        partial(multistep_pp, relaxation="none"),
    ),
    "++3M as published": ("DPMSolverMultistepScheduler", {"solver_order": 3}, partial(multistep_pp, order=3)),
    "UniPC-2 bh2": ("UniPCMultistepScheduler", {"solver_order": 2}, unipc),
    "UniPC-3 bh2": ("UniPCMultistepScheduler", {"solver_order": 3}, partial(unipc, order=3)),
    "UniPC-2 bh1": (
        "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, partial(unipc, variant="bh1")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(THEIRS))
def test_diffusers_classes_on_the_same_nodes_agree(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    cls, settings, ours = THEIRS[name]
    settings = {**settings, "final_sigmas_type": "sigma_min"}
    schedule = VPDiscrete.scaled_linear()
    times = by_log_snr(schedule, 10, -2.0, 3.0)
    got = ours(mixture(schedule), NOISE, times)
    expected = theirs(getattr(diffusers, cls)(**COMMON, **settings), times, NOISE)
    assert (got - expected).abs().max() < 1e-6


def test_diffusers_2s_is_ours_with_its_nodes_in_the_middle() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = VPDiscrete.scaled_linear()
    fine = by_log_snr(schedule, 10, -2.0, 3.0)  # every second one is a middle
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **COMMON, solver_order=2, final_sigmas_type="sigma_min", lower_order_final=False
    )
    expected = theirs(scheduler, fine, NOISE)
    assert (singlestep_pp(mixture(schedule), NOISE, fine[::2]) - expected).abs().max() < 1e-6


# --- thresholding, grids ----------------------------------------------------------------------------------------------


def test_dynamic_thresholding_clips_and_rescales_only_what_leaves_the_range() -> None:
    class Loud(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return torch.cat([0.5 * torch.ones(1, 100), torch.linspace(-4, 4, 100)[None]])

    predict = Predictor(Denoiser(Loud(), VP, "x0"), Condition(), threshold=0.9)
    said = predict(torch.zeros(2, 100), 0.5)
    assert torch.equal(said.x0[0], 0.5 * torch.ones(100))
    assert said.x0[1].abs().max() == 1
    assert (said.x0[1].abs() == 1).float().mean() == pytest.approx(0.1, abs=0.02)
    alpha, sigma = predict.nodes([0.5])[0][1:3]
    torch.testing.assert_close(alpha * said.x0 + sigma * said.noise, torch.zeros(2, 100), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spacing", ["time", "quadratic", "log_snr", "karras", "exponential", "beta"])
@pytest.mark.parametrize("end", ["zero", "minimum", "append"])
@pytest.mark.parametrize("world", list(SCHEDULES))
def test_grids_fall_and_end_as_asked(spacing: Any, end: Any, world: str) -> None:
    schedule = SCHEDULES[world]
    times = grid(schedule, 9, spacing, end=end)
    assert len(times) == 10
    assert checked(times) == times
    assert (times[-1] == 0) == (end != "minimum")


def test_grids_are_uniform_in_what_they_say() -> None:
    schedule = VE()
    rho = torch.tensor([Predictor(mixture(schedule).denoiser, Condition()).nodes([t])[0].sigma
                        for t in grid(schedule, 8, "karras", end="minimum", least=0.01)])  # fmt: skip
    torch.testing.assert_close((rho ** (1 / 7)).diff(), (rho ** (1 / 7)).diff()[:1].expand(8), rtol=1e-6, atol=1e-9)
    inner = torch.tensor(grid(RectifiedFlow(), 8, "log_snr", end="minimum", most=0.99), dtype=torch.float64)
    steps = RectifiedFlow().log_snr(inner).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))
    assert grid(RectifiedFlow(), 8, "log_snr") == grid(RectifiedFlow(), 8, "exponential")
    shifted_times = grid(RectifiedFlow(), 4, "time", factor=3.0)
    assert shifted_times == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    with pytest.raises(ValueError, match="falling times"):
        checked([0.5, 0.6])
    with pytest.raises(ValueError, match="falling times"):
        checked([1.0])
