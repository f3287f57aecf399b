"""Steps by hand: the papers' equations of single steps, the ends of the path, and runs as steps one after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, NOISE, VP, by_log_snr, mixture

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.schedules import VE, NoiseSchedule
from fewstep.samplers.ddim import ddim
from fewstep.samplers.deis import deis
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import multistep_pp, multistep_sde, pp_steps, singlestep_pp
from fewstep.samplers.er_sde import er_sde
from fewstep.samplers.euler import euler
from fewstep.samplers.exponential import HistoryEntry, advance, exponential_integrals, relax
from fewstep.samplers.few_step import renoise
from fewstep.samplers.grids import Node
from fewstep.samplers.heun import Churn, heun, heun_edm
from fewstep.samplers.multistep import Step, falling_orders, multistep, states
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.sa_solver import middle_times, sa_solver
from fewstep.samplers.seeds import seeds
from fewstep.samplers.solvers import SOLVERS
from fewstep.samplers.tcd import tcd
from fewstep.samplers.unipc import unipc, unipc_steps

Z = [torch.randn(200, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(1, 9)]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
CENTRE = FLOW, (1.0, 0.7, 0.4, 0.2, 0.0)  # alpha = 0 at the start, sigma = 0 at the end


def draws() -> Callable[[], Tensor]:
    """Z[0], Z[1], …"""
    return itertools.cycle(Z).__next__


def no_noise() -> Tensor:
    raise AssertionError("no noise is needed here")


# --- the papers' equations --------------------------------------------------------------------------------------------


@pytest.fixture
def step() -> tuple[Node, Node, Callable[[float], Node]]:
    """The ends of a step on a VP schedule, and its nodes at fractions of the log-SNR."""
    s, t = mixture().nodes(by_log_snr(VP, 4)[1:3])

    def at(fraction: float) -> Node:
        log_snr = torch.tensor([s.log_snr + fraction * (t.log_snr - s.log_snr)], dtype=torch.float64)
        return mixture().nodes(VP.time_of_log_snr(log_snr).tolist())[0]

    return s, t, at


def test_dpm_solver_2_and_3_take_the_papers_steps(step: tuple[Node, Node, Callable[[float], Node]]) -> None:
    """arXiv 2206.00927, Algorithms 1 (r1 = 1/2) and 2 (r1 = 1/3, r2 = 2/3)."""
    s, t, at = step
    h = t.log_snr - s.log_snr

    def first_order(node: Node, fraction: float) -> Tensor:
        return node.alpha / s.alpha * NOISE - node.sigma * math.expm1(fraction * h) * noise

    noise, middle = mixture()(NOISE, s.t).noise, at(1 / 2)
    second = mixture()(first_order(middle, 1 / 2), middle.t).noise
    two = t.alpha / s.alpha * NOISE - t.sigma * math.expm1(h) * second
    close(dpm_solver(mixture(), NOISE, [s.t, t.t]), two)

    a, b = at(1 / 3), at(2 / 3)
    difference = mixture()(first_order(a, 1 / 3), a.t).noise - noise
    weight = math.expm1(2 * h / 3) / (2 * h / 3) - 1
    x = first_order(b, 2 / 3) - b.sigma * 2 * weight * difference
    difference = mixture()(x, b.t).noise - noise
    three = first_order(t, 1) - t.sigma * 1.5 * (math.expm1(h) / h - 1) * difference
    close(dpm_solver(mixture(), NOISE, [s.t, t.t], order=3), three)


def test_dpm_solver_pp_2s_takes_the_papers_step(step: tuple[Node, Node, Callable[[float], Node]]) -> None:
    """arXiv 2211.01095, Algorithm 1 with r = 1/2."""
    s, t, at = step
    h, middle = t.log_snr - s.log_snr, at(1 / 2)
    x = middle.sigma / s.sigma * NOISE - middle.alpha * math.expm1(-h / 2) * mixture()(NOISE, s.t).x0
    expected = t.sigma / s.sigma * NOISE - t.alpha * math.expm1(-h) * mixture()(x, middle.t).x0
    close(singlestep_pp(mixture(), NOISE, [s.t, t.t]), expected)


def test_2m_and_its_exact_weights_extrapolate_x0() -> None:
    """++2M (arXiv 2211.01095, Algorithm 2): x0 + h (x0 - old) / 2 h_old, and RES (arXiv 2308.02157): phi_2 for 1/2."""
    times = VP.time_of_log_snr(torch.tensor([-1.0, -0.4, 0.5, 1.2], dtype=torch.float64)).tolist()
    a, b, c, _ = mixture().nodes(times)
    h, old = c.log_snr - b.log_snr, mixture()(NOISE, a.t).x0
    x = b.sigma / a.sigma * NOISE - b.alpha * math.expm1(a.log_snr - b.log_snr) * old
    new = mixture()(x, b.t).x0
    slope = (new - old) / (b.log_snr - a.log_snr)
    linear = c.sigma / b.sigma * x - c.alpha * math.expm1(-h) * new
    for relaxation, weight in (("published", -math.expm1(-h) * h / 2), ("none", h + math.expm1(-h))):
        before = multistep_pp(mixture(), NOISE, times, relaxation=relaxation)  # type: ignore[arg-type]
        x_c = linear + c.alpha * weight * slope
        close(before, advance(x_c, *mixture().nodes(times)[2:], [HistoryEntry(c, mixture()(x_c, c.t))]))


@pytest.mark.parametrize("h", [0.7, -0.3])
def test_the_published_relaxations_of_the_integrals(h: float) -> None:
    """UniPC (arXiv 2302.04867): bh2 takes (e^h - 1) h / 2, bh1 h^2 / 2 (see also its predictor of order 2)."""
    a = exponential_integrals(h, 3)
    for relaxation, first in (("midpoint", a[0] * h / 2), ("published", a[0] * h / 2),
                              ("bh1", math.copysign(h * h / 2, h)), ("none", a[1])):  # fmt: skip
        assert relax(a[:2], h, relaxation) == [a[0], first]  # type: ignore[arg-type]
        expected = [*a[:2], a[2] / 2 if relaxation == "published" else a[2]]
        assert relax(a, h, relaxation) == expected  # type: ignore[arg-type]
        assert relax(a[:1], h, relaxation) == a[:1]  # type: ignore[arg-type]


def test_heun_and_euler_on_a_linear_equation() -> None:
    """dx / dt = x: a step of length h multiplies by 1 + h, or by 1 + h + h^2 / 2; by the slope alone in a last step."""

    class State(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return x_t

    predict = Predictor(Denoiser(State(), FLOW, "velocity"), Condition())
    close(euler(predict, NOISE, [0.9, 0.6]), 0.7 * NOISE)
    close(heun(predict, NOISE, [0.9, 0.6]), (1 - 0.3 + 0.045) * NOISE)
    close(heun(predict, NOISE, [0.9, 0.6, 0.0]), (1 - 0.3 + 0.045) * 0.4 * NOISE)


@pytest.mark.parametrize("schedule", [VE(), VP], ids=["edm", "vp"])
def test_heun_edm_takes_the_papers_step_with_churn(schedule: NoiseSchedule) -> None:
    """arXiv 2206.00364, Algorithm 2, on y = x / alpha: noise up to rho (1 + gamma), then Heun from there."""

    def node(rho: float) -> Node:
        log_snr = -torch.tensor([rho], dtype=torch.float64).log()
        return mixture(schedule).nodes(schedule.time_of_log_snr(log_snr).tolist())[0]

    def slope(y: Tensor, rho: float) -> Tensor:
        at = node(rho)
        return (y - mixture(schedule)(at.alpha * y, at.t).x0) / rho

    levels, z = [40.0, 10.0, 2.0], draws()
    nodes = [node(rho) for rho in levels]
    times = [each.t for each in nodes]
    y = NOISE / nodes[0].alpha
    for rho, following in itertools.pairwise(levels):
        higher = rho * (1 + 0.4 / 2)
        y = y + math.sqrt(higher**2 - rho**2) * 1.1 * z()
        first = slope(y, higher)
        guess = y + (following - higher) * first
        y = y + (following - higher) * (first + slope(guess, following)) / 2
    low, high = (each.sigma / each.alpha for each in (nodes[1], nodes[0]))  # the limits include their ends
    churn = Churn(amount=0.4, low=low, high=high, scale=1.1)

    def run(churn: Churn | None, noise: Callable[[], Tensor] | None) -> Tensor:
        return heun_edm(mixture(schedule), NOISE, times, noise, churn=churn)

    torch.testing.assert_close(run(churn, draws()), nodes[-1].alpha * y, rtol=1e-8, atol=1e-8)
    close(run(Churn(amount=0.4, low=10.1, high=39.9), no_noise), run(None, no_noise))
    close(run(churn, None), run(None, None))
    close(run(Churn(amount=100.0), draws()), run(Churn(amount=2 * (math.sqrt(2) - 1)), draws()))


def test_churn_does_not_leave_the_schedule() -> None:
    """At the largest noise level there is no room for more."""
    got = heun_edm(mixture(VE()), NOISE, (1.0, 0.5), no_noise, churn=Churn(amount=5.0))
    close(got, heun_edm(mixture(VE()), NOISE, (1.0, 0.5)))


def test_ddim_adds_eta_times_the_deviation_of_the_posterior() -> None:
    """arXiv 2010.02502, equations 12 and 16."""
    s, t = mixture().nodes(by_log_snr(VP, 4)[1:3])
    p = mixture()(NOISE, s.t)
    for eta in (0.5, 1.0):
        d = eta * math.sqrt(t.sigma**2 / s.sigma**2 * (1 - s.alpha**2 / t.alpha**2))
        expected = t.alpha * p.x0 + math.sqrt(t.sigma**2 - d**2) * p.noise + d * Z[0]
        close(ddim(mixture(), NOISE, [s.t, t.t], draws(), eta=eta), expected)
    close(ddim(mixture(), NOISE, [s.t, t.t], no_noise), t.alpha * p.x0 + t.sigma * p.noise)


def test_renoising_adds_noise_up_to_the_next_level_and_returns_x0() -> None:
    for schedule in (VP, VE()):  # whose smallest noise level is not 0
        times = [0.9, 0.5, 0.0]
        t = mixture(schedule).nodes(times)[1]
        x = t.alpha * mixture(schedule)(NOISE, 0.9).x0 + t.sigma * Z[0]
        got = renoise(mixture(schedule), NOISE, times, draws())
        torch.testing.assert_close(got, mixture(schedule)(x, 0.5).x0, rtol=1e-13, atol=1e-13)


# --- the ends of the path ---------------------------------------------------------------------------------------------

DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.noisy]
RENOISING = [name for name, solver in SOLVERS.items() if solver.noisy and name not in ("tcd", "sa_solver")]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_step_from_pure_noise_is_of_first_order(name: str) -> None:
    got = SOLVERS[name](mixture(FLOW), NOISE, (1.0, 0.6), no_noise)
    if name != "heun":  # which has no difficulty there
        close(got, ddim(mixture(FLOW), NOISE, (1.0, 0.6)))


@pytest.mark.parametrize("name", RENOISING)
def test_a_noisy_step_from_pure_noise_keeps_nothing_of_it(name: str) -> None:
    close(SOLVERS[name](mixture(FLOW), NOISE, (1.0, 0.6), draws()), 0.4 * mixture(FLOW)(NOISE, 1.0).x0 + 0.6 * Z[0])


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_step_to_clean_data_returns_x0(name: str) -> None:
    got = SOLVERS[name](mixture(FLOW), NOISE, (0.6, 0.0), lambda: torch.zeros_like(NOISE))
    close(got, mixture(FLOW)(NOISE, 0.6).x0)


# --- runs -------------------------------------------------------------------------------------------------------------

ONE_STEP_RULES = [
    "euler", "ddim", "ddpm", "heun", "heun_edm", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "res_2s", "sde_dpmpp_1",
    "seeds_2", "seeds_3", "tcd",
]  # fmt: skip


@pytest.mark.parametrize("name", ONE_STEP_RULES)
def test_a_rule_without_memory_takes_one_step_after_another(name: str) -> None:
    schedule, times = CENTRE
    noise, x = draws(), NOISE
    for pair in itertools.pairwise(times):
        x = SOLVERS[name](mixture(schedule), x, pair, noise)
    close(SOLVERS[name](mixture(schedule), NOISE, times, draws()), x)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_memory_of_er_sde_starts_after_pure_noise(stages: int) -> None:
    schedule, times = CENTRE
    noise = draws()
    x = er_sde(mixture(schedule), NOISE, times[:2], noise, stages=stages)
    x = er_sde(mixture(schedule), x, times[1:], noise, stages=stages)
    close(er_sde(mixture(schedule), NOISE, times, draws(), stages=stages), x)


WITHOUT_NOISE = {
    "ddpm": partial(ddim, eta=1.0), "sde 2M": multistep_sde, "sde 3M": partial(multistep_sde, order=3),
    "seeds 2": seeds, "seeds 3": partial(seeds, order=3), "sa": sa_solver, "er": er_sde,
}  # fmt: skip


@pytest.mark.parametrize("name", list(WITHOUT_NOISE))
def test_without_noise_the_noise_term_is_left_out(name: str) -> None:
    schedule, times = CENTRE
    zero = WITHOUT_NOISE[name](mixture(schedule), NOISE, times, lambda: torch.zeros_like(NOISE))
    close(WITHOUT_NOISE[name](mixture(schedule), NOISE, times, None), zero)


def test_rules_that_add_no_noise_draw_none() -> None:
    schedule, times = CENTRE
    for form in ("data", "noise"):
        multistep(mixture(schedule), NOISE, times, [Step(2, form)] * 4, no_noise)  # type: ignore[arg-type]
    tcd(mixture(FLOW), NOISE, times, no_noise, gamma=0.0)
    sa_solver(mixture(FLOW), NOISE, times, no_noise, tau=lambda t: 0.0)
    heun_edm(mixture(FLOW), NOISE, times, no_noise)
    er_sde(mixture(FLOW), NOISE, (0.6, 0.0), no_noise)


def test_sa_solver_is_stochastic_in_the_middle() -> None:
    assert [middle_times(t) for t in (0.19, 0.2, 0.5, 0.8, 0.81)] == [0, 1, 1, 1, 0]


def test_unipc_corrects_every_step_but_those_that_it_is_told() -> None:
    times = by_log_snr(VP, 6)
    by_default = [Step(p, "data", "midpoint", True, "midpoint") for p in falling_orders(2, 6)]
    assert unipc_steps(6) == by_default
    close(unipc(mixture(), NOISE, times), multistep(mixture(), NOISE, times, by_default))
    some = [Step(p, "data", "bh1", i != 2, "bh1") for i, p in enumerate(falling_orders(3, 6))]
    got = unipc(mixture(), NOISE, times, order=3, variant="bh1", uncorrected=[2])
    close(got, multistep(mixture(), NOISE, times, some))
    corrected, partly = (list(states(mixture(), NOISE, times, steps)) for steps in (unipc_steps(6, 3, "bh1"), some))
    assert [torch.equal(a, b) for a, b in zip(corrected, partly, strict=True)] == [True, True, *[False] * 4]
    never = unipc(mixture(), NOISE, times, correct=False)
    close(never, multistep_pp(mixture(), NOISE, times))
    assert not torch.allclose(unipc(mixture(), NOISE, times), never)


def test_2m_is_the_default_multistep_rule_and_deis_3_the_default_deis() -> None:
    times = by_log_snr(VP, 6)
    close(deis(mixture(), NOISE, times), deis(mixture(), NOISE, times, order=3))
    assert pp_steps(6) == [Step(p, "data", "published") for p in falling_orders(2, 6)]


def test_the_noise_form_returns_x0_at_the_end() -> None:
    schedule, times = CENTRE
    *_, before, last = states(mixture(schedule), NOISE, times, [Step(2, "noise", "none")] * 4)
    close(last, mixture(schedule)(before, times[-2]).x0)


@pytest.mark.parametrize("step", [Step(2, "date"), Step(2, "data", "midpiont")])  # type: ignore[arg-type]
def test_an_unknown_form_or_relaxation_is_refused(step: Step) -> None:
    with pytest.raises(ValueError, match=r"there is no form .* or no relaxation"):
        multistep(mixture(), NOISE, by_log_snr(VP, 3), [step] * 3)
