"""DPM-Solver-v3: its step against quadrature, its corrector, its ends, and the moments of its statistics."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn
from worlds import FLOW, HIGH, LOW, NOISE, VP, by_log_snr, mixture

from fewstep.core.files import read_tensors
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import UNGUIDED, Guidance
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.samplers.ddim import ddim
from fewstep.samplers.dpm_solver_v3 import (
    Statistics,
    StatisticsAtNodes,
    derivatives,
    dpm_solver_v3,
    nested_derivatives,
)
from fewstep.samplers.exponential import exponential_integrals
from fewstep.samplers.grids import Node
from fewstep.samplers.statistics import _SampleMeans, estimate_statistics


def statistics(intervals: int, *, trivial: bool = False) -> Statistics:
    """(l, s, b) that all change, or (1, 0, 0)."""
    u = torch.linspace(LOW, HIGH, intervals + 1, dtype=torch.float64)
    columns = (torch.ones_like(u), 0 * u, 0 * u) if trivial else (l_of(u), s_of(u), b_of(u))
    return Statistics(u, *(column[:, None].repeat(1, 2) for column in columns))


def l_of(u: Tensor) -> Tensor:
    return 0.5 + 0.2 * u


def s_of(u: Tensor) -> Tensor:
    return -0.4 + 0.1 * u


def b_of(u: Tensor) -> Tensor:
    return 0.3 - 0.2 * u


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("pseudo", [False, True])
def test_a_step_takes_the_weights_of_the_papers_integrals(count: int, pseudo: bool) -> None:
    """x_t = alpha_t e^(L_s - L_t) (x_s / alpha_s - F - sum_k E_k g^(k)); not at the first statistic."""
    nodes = mixture().nodes(by_log_snr(VP, 9)[2:6])
    history, s, t = nodes[2::-1][:count], nodes[2], nodes[3]

    def integral(f: object, a: float, b: float) -> float:
        return quad(lambda u: float(f(torch.tensor(u, dtype=torch.float64))), a, b, epsabs=1e-12)[0]  # type: ignore[operator]

    def growth(u: float) -> float:
        return math.exp(integral(lambda v: l_of(v) + s_of(v), s.log_snr, u))

    def since(u: float) -> float:
        """exp(S_s) (B_u - B_s)"""
        return quad(lambda v: math.exp(-integral(s_of, s.log_snr, v)) * float(b_of(torch.tensor(v))), s.log_snr, u)[0]

    f = [torch.tensor([0.7, -0.4, 0.9][k], dtype=torch.float64) for k in range(count)]
    offsets = [node.log_snr - s.log_snr for node in history]
    g = [
        math.exp(-integral(s_of, s.log_snr, node.log_snr)) * value - since(node.log_snr)
        for node, value in zip(history, f, strict=True)
    ]
    rows = [g[0], *(nested_derivatives if pseudo else derivatives)(g, offsets)]
    offset = quad(lambda u: growth(u) * since(u), s.log_snr, t.log_snr, epsabs=1e-10)[0]
    total = 1.3 / s.alpha - offset
    for k, row in enumerate(rows):
        weight = quad(lambda u, k=k: growth(u) * (u - s.log_snr) ** k / math.factorial(k), s.log_snr, t.log_snr)[0]
        total = total - weight * row.item()
    expected = t.alpha * math.exp(-integral(l_of, s.log_snr, t.log_snr)) * total

    like = torch.zeros(1, 2, dtype=torch.float64)
    weights = StatisticsAtNodes(statistics(2000), nodes).step(s, t, history, pseudo, like)
    got = weights.state * 1.3 + weights.constant + sum(w * v for w, v in zip(weights.outputs, f, strict=True))
    assert got.flatten().tolist() == pytest.approx([expected] * 2, abs=2e-6)
    assert weights.state.dtype == weights.outputs[0].dtype == torch.float64
    half = StatisticsAtNodes(statistics(50), nodes).step(s, t, history, pseudo, like.float())
    assert {half.state.dtype, half.constant.dtype, half.outputs[0].dtype} == {torch.float32}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("pseudo", [False, True])
def test_predictor_and_corrector_take_the_outputs_of_their_order(order: int, pseudo: bool) -> None:
    """With (1, 0, 0), where a step is sigma_t / sigma_s x + alpha_t sum_k A_k m^(k): the corrector takes the newest
    output second, as many as the predictor, one more with ``pseudo``."""

    def step(x: Tensor, s: Node, t: Node, history: list[tuple[Node, Tensor]]) -> Tensor:
        values, offsets = [m for _, m in history], [node.log_snr - s.log_snr for node, _ in history]
        rows = [values[0], *(nested_derivatives if pseudo else derivatives)(values, offsets)]
        a = exponential_integrals(t.log_snr - s.log_snr, len(rows))
        return t.sigma / s.sigma * x + t.alpha * sum(w * row for w, row in zip(a, rows, strict=True))

    times = by_log_snr(VP, 6)
    grid = mixture().nodes(times)
    x, previous, used = NOISE, NOISE, 0
    history: list[tuple[Node, Tensor]] = []
    for i, (s, t) in enumerate(pairwise(grid)):
        entry = (s, mixture()(x, s.t).x0)
        count = used + pseudo
        if history and count > 1:
            x = step(previous, history[0][0], s, [history[0], entry, *history[1:]][:count])
        history = [entry, *history]
        previous, used = x, min(order, len(history), 6 - i)
        x = step(x, s, t, history[:used])
    got = dpm_solver_v3(mixture(), NOISE, times, statistics(4800, trivial=True), order=order, pseudo=pseudo)
    torch.testing.assert_close(got, x, rtol=0, atol=2e-6)
    if order == 2 and not pseudo:
        assert torch.equal(got, dpm_solver_v3(mixture(), NOISE, times, statistics(4800, trivial=True)))


def test_the_ends_of_a_flow_are_of_first_order() -> None:
    stats, times = statistics(200), (1.0, 0.7, 0.5, 0.3, 0.0)
    first = ddim(mixture(FLOW), NOISE, times[:2])
    rest = dpm_solver_v3(mixture(FLOW), first, times[1:], stats, order=3)
    torch.testing.assert_close(dpm_solver_v3(mixture(FLOW), NOISE, times, stats, order=3), rest)
    last = dpm_solver_v3(mixture(FLOW), NOISE, (0.6, 0.0), stats)
    torch.testing.assert_close(last, mixture(FLOW)(NOISE, 0.6).x0)


def test_few_statistics_are_enough_for_the_integrals() -> None:
    """Twelve intervals of (1, 0, 0): the exponentials of them are integrated more finely."""
    times = by_log_snr(VP, 1)
    s, t = mixture().nodes(times)
    exact = t.sigma / s.sigma * NOISE - t.alpha * math.expm1(s.log_snr - t.log_snr) * mixture()(NOISE, s.t).x0
    got = dpm_solver_v3(mixture(), NOISE, times, statistics(12, trivial=True), order=1)
    assert (got - exact).abs().max() / exact.abs().max() < 1e-3


def test_statistics_are_linear_between_their_points_and_constant_beyond() -> None:
    u = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    values = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    stats = Statistics(u, values, values, values)
    like = torch.zeros(1, 1, dtype=torch.float64)
    for log_snr, expected in ((-2.0, 1.0), (0.0, 1.0), (0.5, 1.5), (2.0, 4.0), (3.0, 6.0), (5.0, 6.0)):
        node = Node(0.5, 1.0, math.exp(-log_snr), log_snr)
        at = stats.at([node])
        assert at.slope(node, like).item() == pytest.approx(expected)
        assert at.slope(node, like.float()).dtype == torch.float32
        assert at.slope(node, like).dtype == torch.float64, "each type has its own copy"


# --- the moments of statistics ----------------------------------------------------------------------------------------


class Square(nn.Module):
    """A noise prediction with a curved dependence on x and one on the time, element by element."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return 0.3 * x_t**2 + 0.2 * torch.sin(3 * t)[:, None]


def means(network: nn.Module, batch: int) -> _SampleMeans:
    x0 = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return _SampleMeans(Denoiser(network, FLOW, "noise"), x0, Condition(), UNGUIDED, 3, batch)


@pytest.mark.parametrize("batch", [16, 40])
def test_the_moments_are_means_over_all_batches_with_the_slope_along_the_ode(batch: int) -> None:
    """f' by central differences along dx = (alpha' / alpha) x - sigma e, with the given l and its slope."""
    own, log_snr, delta = means(Square(), batch), torch.tensor(0.4, dtype=torch.float64), 1e-4
    given, slope = torch.tensor([0.6, -0.3], dtype=torch.float64), torch.tensor([0.2, 0.5], dtype=torch.float64)

    def at(shift: float) -> tuple[Tensor, Tensor, Tensor]:
        t = FLOW.time_of_log_snr(log_snr + shift)
        return t, FLOW.alpha(t), FLOW.sigma(t)

    def f(x: Tensor, shift: float) -> Tensor:
        t, alpha, sigma = at(shift)
        e = Square()(x, t.repeat(len(x)), Condition())
        return (sigma * e - (given + shift * slope) * x) / alpha

    x, (t, alpha, sigma) = [], at(0.0)
    generator = torch.Generator().manual_seed(3)
    for part in own.x0.split(batch):
        x.append(alpha * part + sigma * torch.randn(part.shape, generator=generator))
    x_t = torch.cat(x)
    d_alpha = (at(delta)[1] - at(-delta)[1]) / (2 * delta)
    dx = d_alpha / alpha * x_t - sigma * Square()(x_t, t.repeat(40), Condition())
    f_prime = (f(x_t + delta * dx, delta) - f(x_t - delta * dx, -delta)) / (2 * delta)
    value = f(x_t, 0.0)
    expected = torch.stack([value, f_prime, value * value, value * f_prime]).mean(1)
    got = own.moments(log_snr, given, slope)
    assert got.dtype == torch.float32, "as the file stores them"
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [16, 40])
def test_the_slope_is_the_mean_of_the_jacobians_diagonal(batch: int) -> None:
    """E sigma 0.6 x, exact for an element-wise model."""
    own, log_snr = means(Square(), batch), torch.tensor(0.4, dtype=torch.float64)
    t = FLOW.time_of_log_snr(log_snr)
    generator, x = torch.Generator().manual_seed(3), []
    for part in own.x0.split(batch):
        x.append(FLOW.alpha(t) * part + FLOW.sigma(t) * torch.randn(part.shape, generator=generator))
        torch.randint(0, 2, part.shape, generator=generator)
    expected = FLOW.sigma(t) * 0.6 * torch.cat(x).mean(0)
    torch.testing.assert_close(own.slope(log_snr), expected)


def test_a_single_sample_has_a_mean() -> None:
    own = means(Square(), 8)
    own.x0 = own.x0[:1]
    assert own.slope(torch.tensor(0.0, dtype=torch.float64)).shape == (2,)


def test_random_signs_average_out_the_other_entries_of_the_jacobian() -> None:
    class Mixing(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return torch.stack([0.3 * x_t[:, 0] + x_t[:, 1], 0.7 * x_t[:, 1] - x_t[:, 0]], 1)

    own, log_snr = means(Mixing(), 4000), torch.tensor(0.0, dtype=torch.float64)
    own.x0 = torch.zeros(4000, 2, dtype=torch.float64)
    assert own.slope(log_snr).tolist() == pytest.approx([0.5 * 0.3, 0.5 * 0.7], abs=0.03)


def test_statistics_depend_on_the_guidance_and_on_the_conditions_of_their_samples(tmp_path: Path) -> None:
    """Of a mixture of two classes, at the first log-SNR above 0; each sample with its own class, in any batches."""
    mixture_of_two = GaussianMixture([0.5, 0.5], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6], labels=[0, 1])
    denoiser = Denoiser(MixtureBackbone(mixture_of_two, FLOW), FLOW, "x0")
    labels = torch.arange(64) % 2
    x0 = torch.tensor([[-1.5, 0.5], [1.0, -0.5]])[labels] + 0.5 * torch.randn(64, 2)

    def measured(guidance: float, batch: int, order: Tensor) -> Tensor:
        file = tmp_path / f"{guidance}-{batch}-{order[0]}.safetensors"
        condition, done = Condition.of_labels(labels[order], 2), []
        estimate_statistics(
            denoiser, x0, condition, file, guidance=Guidance(guidance), intervals=4, batch=batch,
            progress=lambda k, of: done.append((k, of)),
        )  # fmt: skip
        assert done == [(k, 10) for k in range(1, 11)]
        tensors = read_tensors(file)
        return torch.stack([tensors["l"][2], tensors["b"][2]])

    as_is, swapped = torch.arange(64), torch.arange(64).flip(0)
    plain = measured(1.0, 64, as_is)
    torch.testing.assert_close(measured(1.0, 16, as_is)[0], plain[0], rtol=0, atol=0.05)
    assert (measured(2.0, 64, as_is) - plain)[0].abs().max() > 0.1
    assert not torch.equal(measured(1.0, 64, swapped), plain)
