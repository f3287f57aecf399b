"""SA-Solver, ER-SDE, SEEDS, TCD and the SDE ++3M: the papers' equations by hand, their limits, diffusers' classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from worlds import FLOW, HIGH, LOW, NOISE, VP, by_log_snr, mixture

from fewstep.models.schedules import VE, VPDiscrete
from fewstep.samplers import exponential
from fewstep.samplers.ddim import ddim
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import multistep_sde, pp_steps
from fewstep.samplers.er_sde import er_sde, released_scaling
from fewstep.samplers.few_step import renoise
from fewstep.samplers.grids import Node
from fewstep.samplers.multistep import Step, falling_orders, multistep, states
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.sa_solver import sa_solver
from fewstep.samplers.seeds import noise_path, seeds
from fewstep.samplers.solvers import SOLVERS
from fewstep.samplers.tcd import tcd

Z = [torch.randn(200, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(1, 9)]


def draws() -> Callable[[], Tensor]:
    """Z[0], Z[1], …"""
    return itertools.cycle(Z).__next__


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the SDE ++3M -----------------------------------------------------------------------------------------------------


def test_a_step_of_the_sde_3m_takes_the_weights_of_k_diffusion() -> None:
    """phi2 = 1 + expm1(-2h) / 2h, phi3 = phi2 / 2h - 1/2; x += phi2 d1 - phi3 d2, on steps that are not equal."""
    times = VP.time_of_log_snr(torch.tensor([-1.0, -0.4, 0.3, 1.1, 1.6, 2.0], dtype=torch.float64)).tolist()
    predict, path = mixture(), [NOISE]
    path += states(mixture(), NOISE, times, pp_steps(5, 3, "published", "sde"))
    m2, m1, m0 = (predict(x, t).x0 for x, t in zip(path[:3], times, strict=False))
    a, b, c, d = predict.nodes(times)[:4]
    h, r0, r1 = d.log_snr - c.log_snr, (c.log_snr - b.log_snr), (b.log_snr - a.log_snr)
    d10, d11 = (m0 - m1) / (r0 / h), (m1 - m2) / (r1 / h)
    d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / ((r0 + r1) / h)
    phi2 = 1 + math.expm1(-2 * h) / (2 * h)
    phi3 = phi2 / (2 * h) - 0.5
    expected = d.sigma / c.sigma * math.exp(-h) * path[2] - d.alpha * math.expm1(-2 * h) * m0
    expected = expected + d.alpha * (phi2 * d1 - phi3 * d2)
    torch.testing.assert_close(path[3], expected, rtol=1e-10, atol=1e-10)


# --- SA-Solver --------------------------------------------------------------------------------------------------------


def test_sa_solver_without_stochasticity_is_unipc_with_exact_weights() -> None:
    times = by_log_snr(VP, 9)
    steps = [Step(p, "data", "none", True, "none") for p in falling_orders(3, 9)]
    expected = multistep(mixture(), NOISE, times, steps)
    torch.testing.assert_close(sa_solver(mixture(), NOISE, times, draws(), tau=lambda t: 0.0), expected)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_sa_solver_equals_diffusers(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A predictor of three steps and the corrector of the same outputs and the new one ("order 4"). diffusers takes
    c h^2 / 2 for A_1 in steps with two outputs, which this package does not: it is replaced for the comparison."""
    diffusers = pytest.importorskip("diffusers")
    predict, times = mixture(), by_log_snr(VP, 9, LOW + 0.123)  # nodes of their own: weights are cached by the nodes
    scheduler = diffusers.SASolverScheduler(
        predictor_order=3, corrector_order=4, prediction_type="sample", tau_func=lambda t: torch.tensor(tau)
    )
    scheduler.set_timesteps(9)
    scheduler.sigmas = torch.tensor([node.sigma / node.alpha for node in predict.nodes(times)], dtype=torch.float64)
    x, generator = NOISE, seeded(5)
    for t, label in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(predict(x, t).x0, label, x, generator=generator).prev_sample
    same = seeded(5)
    noise = partial(torch.randn, NOISE.shape, generator=same, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(exponential, "relax", lambda a, h, _: [a[0], (1 + tau**2) * h**2 / 2] if len(a) == 2 else a)
        got = sa_solver(mixture(), NOISE, times, noise, tau=lambda t: tau)
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)


def test_the_correction_adds_the_noise_of_the_prediction() -> None:
    """A step by hand: prediction with z, then the corrector's two outputs and the same z."""
    predict, times = mixture(), by_log_snr(VP, 6)[:3]
    s, t, end = predict.nodes(times)
    h, tau = t.log_snr - s.log_snr, 1.0
    c = 1 + tau**2
    linear = t.sigma / s.sigma * math.exp(-(tau**2) * h) * NOISE
    noise = t.sigma * math.sqrt(1 - math.exp(-2 * tau**2 * h)) * Z[0]
    first = predict(NOISE, s.t).x0
    predicted = linear + t.alpha * (1 - math.exp(-c * h)) * first + noise
    second = predict(predicted, t.t).x0
    a = [quad(lambda r, k=k: c * math.exp(-c * (h - r)) * (r / h) ** k, 0, h)[0] for k in range(2)]
    corrected = linear + t.alpha * ((a[0] - a[1]) * first + a[1] * second) + noise
    h2 = end.log_snr - t.log_snr
    expected = end.sigma / t.sigma * math.exp(-h2) * corrected - end.alpha * math.expm1(-2 * h2) * second
    expected = expected + end.sigma * math.sqrt(1 - math.exp(-2 * h2)) * Z[1]
    torch.testing.assert_close(sa_solver(mixture(), NOISE, times, draws(), tau=lambda t: tau), expected)


def test_sa_solver_is_stochastic_in_the_middle_of_the_run_only() -> None:
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return Z[0]

    sa_solver(mixture(FLOW), NOISE, [0.95, 0.9, 0.81, 0.7, 0.5, 0.2, 0.1, 0.0], noise)
    assert len(drawn) == 3, "the steps that start at 0.7, 0.5 and 0.2"


# --- ER-SDE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_er_sde_takes_the_papers_stages(stages: int) -> None:
    predict, times = mixture(), by_log_snr(VP, 8)[:4]
    nodes = predict.nodes(times)
    rho = [node.sigma / node.alpha for node in nodes]
    path = [NOISE, *(er_sde(mixture(), NOISE, times[: k + 1], draws(), stages=stages) for k in (1, 2))]
    m0, m1, m2 = (predict(x, t).x0 for x, t in zip(path, times, strict=False))
    r = released_scaling(rho[3]) / released_scaling(rho[2])
    integrals = [
        quad(lambda u, k=k: (u - rho[2]) ** k / (u * (math.exp(u**0.3) + 10)), rho[3], rho[2], epsrel=1e-12)[0]
        for k in range(2)
    ]
    h, phi = rho[3] - rho[2], rho[3] * (math.exp(rho[3] ** 0.3) + 10)
    slope, before = (m2 - m1) / (rho[2] - rho[1]), (m1 - m0) / (rho[1] - rho[0])
    curvature = 2 * (slope - before) / (rho[2] - rho[0])
    y = r * path[2] / nodes[2].alpha + (1 - r) * m2 + math.sqrt(rho[3] ** 2 - r**2 * rho[2] ** 2) * Z[2]
    if stages > 1:
        y = y + (h + phi * integrals[0]) * slope
    if stages > 2:
        y = y + (h**2 / 2 + phi * integrals[1]) * curvature
    got = er_sde(mixture(), NOISE, times, draws(), stages=stages)
    torch.testing.assert_close(got, nodes[3].alpha * y, rtol=1e-9, atol=1e-9)


def test_er_sde_of_the_identity_is_the_ode() -> None:
    times = by_log_snr(VP, 9)
    ode = partial(er_sde, noise=draws(), scaling=lambda u: u)
    torch.testing.assert_close(ode(mixture(), NOISE, times, stages=1), ddim(mixture(), NOISE, times))
    truth = dpm_solver(mixture(), NOISE, by_log_snr(VP, 600), order=3)
    for stages, order in ((1, 1), (2, 2), (3, 2)):
        errors = [
            (er_sde(mixture(), NOISE, by_log_snr(VP, n), lambda: NOISE, stages=stages, scaling=lambda u: u) - truth)
            .square().mean().sqrt().item()
            for n in (40, 160)
        ]  # fmt: skip
        assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(order, abs=0.15)


def test_er_sde_from_pure_noise_renoises() -> None:
    got = er_sde(mixture(FLOW), NOISE, [1.0, 0.6], draws())
    torch.testing.assert_close(got, 0.4 * mixture(FLOW)(NOISE, 1.0).x0 + 0.6 * Z[0])


# --- SEEDS ------------------------------------------------------------------------------------------------------------


def test_seeds_2_and_3_take_the_papers_steps() -> None:
    """The stages and the noise of the paper's Algorithms, written out for tau = 1."""
    s, t = mixture().nodes(by_log_snr(VP, 5)[:2])
    h = t.log_snr - s.log_snr

    def at(fraction: float) -> Node:
        log_snr = torch.tensor([s.log_snr + fraction * h], dtype=torch.float64)
        return mixture().nodes(VP.time_of_log_snr(log_snr).tolist())[0]

    def phi1(z: float) -> float:
        return math.expm1(z) / z

    def phi2(z: float) -> float:
        return (math.expm1(z) - z) / z**2

    def linear(node: Node, fraction: float) -> Tensor:
        return node.sigma / s.sigma * math.exp(-fraction * h) * NOISE

    def fresh(fraction: float) -> float:
        return math.sqrt(1 - math.exp(-2 * fraction * h))

    first = mixture()(NOISE, s.t).x0
    middle = at(1 / 2)
    x = linear(middle, 0.5) - middle.alpha * math.expm1(-h) * first + middle.sigma * fresh(0.5) * Z[0]
    second = mixture()(x, middle.t).x0
    two = linear(t, 1) - t.alpha * math.expm1(-2 * h) * second
    two = two + t.sigma * (math.exp(-h / 2) * fresh(0.5) * Z[0] + fresh(0.5) * Z[1])
    times = [s.t, t.t]
    torch.testing.assert_close(seeds(mixture(), NOISE, times, draws()), two, rtol=1e-9, atol=1e-9)

    a, b = at(1 / 3), at(2 / 3)
    x = linear(a, 1 / 3) - a.alpha * math.expm1(-2 * h / 3) * first + a.sigma * fresh(1 / 3) * Z[0]
    second = mixture()(x, a.t).x0
    z, carried = -4 * h / 3, math.exp(-h / 3)
    weight = 4 * h / 3 * phi2(z) * 2
    x = linear(b, 2 / 3) + b.alpha * ((4 * h / 3 * phi1(z) - weight) * first + weight * second)
    noise = carried * fresh(1 / 3) * Z[0] + fresh(1 / 3) * Z[1]
    third = mixture()(x + b.sigma * noise, b.t).x0
    weight = 2 * h * phi2(-2 * h) * 1.5
    three = linear(t, 1) + t.alpha * ((2 * h * phi1(-2 * h) - weight) * first + weight * third)
    three = three + t.sigma * (carried * noise + fresh(1 / 3) * Z[2])
    got = seeds(mixture(), NOISE, times, draws(), order=3)
    torch.testing.assert_close(got, three, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_the_noise_of_a_step_of_seeds_is_one_path_of_the_sde(order: int) -> None:
    """However many inner nodes there are, the noise at t has the variance sigma_t^2 (1 - exp(-2h))."""
    nodes = mixture().nodes(by_log_snr(VP, order, -1, 1))
    generator = seeded(0)
    path = noise_path(nodes, torch.zeros(200_000, 1), lambda: torch.randn(200_000, 1, generator=generator))
    for node, noise in zip(nodes[1:], path, strict=True):
        exact = node.sigma * math.sqrt(1 - math.exp(-2 * (node.log_snr - nodes[0].log_snr)))
        assert noise.std().item() == pytest.approx(exact, rel=0.01)
    (a, b), (x, y) = nodes[1:3], path[:2]
    factor = b.sigma / a.sigma * math.exp(-(b.log_snr - a.log_snr))
    assert ((x * y).mean() / x.square().mean()).item() == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("order", [2, 3])
def test_seeds_without_noise_converges_to_the_noise_free_sde(order: int) -> None:
    def zero() -> Tensor:
        return torch.zeros_like(NOISE)

    truth = seeds(mixture(), NOISE, by_log_snr(VP, 600), zero, order=3)
    errors = [
        (seeds(mixture(), NOISE, by_log_snr(VP, n), zero, order=order) - truth).square().mean().sqrt().item()
        for n in (40, 80, 160)
    ]
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(order, abs=0.2)
    assert SOLVERS[f"seeds_{order}"].order == order


# --- students' rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [FLOW, VP, VE()], ids=["flow", "vp", "edm"])
def test_tcd_lies_between_ddim_and_renoising(schedule: object) -> None:
    times = [0.9, 0.7, 0.4, 0.0]

    def world() -> Predictor:
        return mixture(schedule)  # type: ignore[arg-type]

    torch.testing.assert_close(tcd(world(), NOISE, times, draws(), gamma=0.0), ddim(world(), NOISE, times))
    if not isinstance(schedule, VE):  # whose smallest noise level is not 0
        renoised = renoise(world(), NOISE, times, draws())
        torch.testing.assert_close(tcd(world(), NOISE, times, draws(), gamma=1.0), renoised)
    a, t = world().nodes([0.9, 0.7])
    s = world().nodes([0.7 * 0.7])[0]
    p = world()(NOISE, a.t)
    ratio = t.alpha / s.alpha
    expected = ratio * (s.alpha * p.x0 + s.sigma * p.noise) + math.sqrt(t.sigma**2 - (ratio * s.sigma) ** 2) * Z[0]
    torch.testing.assert_close(SOLVERS["tcd"].run(world(), NOISE, [0.9, 0.7], draws()), expected)  # type: ignore[call-arg]


def test_tcd_equals_diffusers() -> None:
    """At gamma 0.3, in float32; diffusers rounds (1 - gamma) t down to a timestep, here that of an exact one."""
    diffusers = pytest.importorskip("diffusers")
    schedule = VPDiscrete.scaled_linear()
    scheduler = diffusers.TCDScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(2)  # 999 and 499
    labels = scheduler.timesteps.tolist()
    x, predict = NOISE, mixture(schedule)
    step = scheduler.step(predict(x, (labels[0] + 1) / 1000).x0, labels[0], x, eta=0.3, generator=seeded(2))
    gamma = 1 - (math.floor(0.7 * labels[1]) + 1) / (labels[1] + 1)
    noise = partial(torch.randn, NOISE.shape, generator=seeded(2), dtype=torch.float64)
    times = [(label + 1) / 1000 for label in labels]
    got = tcd(mixture(schedule), NOISE, times, noise, gamma=gamma)
    torch.testing.assert_close(got, step.prev_sample, rtol=1e-4, atol=1e-4)


def test_lcm_is_renoising() -> None:
    """diffusers' class also weights x0 and x by the student's c_out and c_skip, 1 and 0 but for the smallest times."""
    diffusers = pytest.importorskip("diffusers")
    schedule = VPDiscrete.scaled_linear()
    scheduler = diffusers.LCMScheduler(prediction_type="sample")
    scheduler.set_timesteps(3)
    labels = scheduler.timesteps.tolist()
    x, predict, generator = NOISE, mixture(schedule), seeded(2)
    for label in labels:
        x = scheduler.step(predict(x, (label + 1) / 1000).x0, label, x, generator=generator).prev_sample
    same = seeded(2)
    noise = partial(torch.randn, NOISE.shape, generator=same, dtype=torch.float64)
    times = [*((label + 1) / 1000 for label in labels), 0.0]
    torch.testing.assert_close(renoise(mixture(schedule), NOISE, times, noise), x, rtol=1e-3, atol=1e-3)


def test_multistep_sde_3m_without_noise_is_of_order_2() -> None:
    rule = partial(multistep_sde, noise=None, order=3)
    truth = seeds(mixture(), NOISE, by_log_snr(VP, 400, LOW, HIGH), None, order=3)
    errors = [(rule(mixture(), NOISE, by_log_snr(VP, n)) - truth).square().mean().sqrt().item() for n in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.4)
