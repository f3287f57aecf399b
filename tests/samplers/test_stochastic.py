"""Solvers that add noise, and the renoising rule of students, against the exact laws of Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, VP, by_log_snr

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import VE, NoiseSchedule
from fewstep.samplers.exponential import Noise
from fewstep.samplers.few_step import renoise
from fewstep.samplers.grids import grid, time_uniform
from fewstep.samplers.heun import Churn, heun_edm
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS


def gaussian_predictor(mean: float, std: float, schedule: NoiseSchedule) -> Predictor:
    model = MixtureBackbone(GaussianMixture.single(mean, std, 1), schedule)
    return Predictor(Denoiser(model, schedule, "x0"), Condition())


def noise_source(n: int, seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, 1, generator=generator, dtype=torch.float64)


NOISY = [name for name, solver in SOLVERS.items() if solver.noisy and name not in ("tcd", "renoise")]


@pytest.mark.parametrize("name", NOISY)
def test_stochastic_solvers_keep_the_variance_of_gaussian_data(name: str) -> None:
    m, k, noise = 0.4, 0.6, noise_source(40_000, 1)
    predict = gaussian_predictor(m, k, VP)
    times = by_log_snr(VP, 400, -3, 3)
    s, t = predict.nodes([times[0], times[-1]])
    x = SOLVERS[name](predict, s.alpha * m + math.hypot(s.alpha * k, s.sigma) * noise(), times, noise)
    assert x.mean().item() == pytest.approx(t.alpha * m, abs=0.01)
    assert x.std().item() == pytest.approx(math.hypot(t.alpha * k, t.sigma), rel=0.015)


def test_churn_removes_the_noise_that_it_adds() -> None:
    """On Gaussian data the law at the end is the same with and without churn."""
    m, k, noise = 0.4, 0.6, noise_source(100_000, 1)
    predict = gaussian_predictor(m, k, VE())
    initial_sigma = predict.nodes([1.0])[0].sigma
    times = grid(VE(), 60, "karras")
    x = heun_edm(predict, initial_sigma * noise(), times, noise, churn=Churn(amount=20, low=0.05, high=50))
    assert x.mean().item() == pytest.approx(m, abs=0.01)
    assert x.std().item() == pytest.approx(k, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_with_the_exact_endpoint_map_keeps_the_data(steps: int) -> None:
    """If the student's x0 is the end of the teacher's ODE, every grid reproduces N(m, k^2)."""
    m, k = 0.7, 0.5

    class Endpoint(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            v = ((1 - t) ** 2 * k**2 + t**2)[:, None]
            return m + (x_t - (1 - t)[:, None] * m) * k / v.sqrt()

    student, noise = Predictor(Denoiser(Endpoint(), FLOW, "x0"), Condition()), noise_source(200_000, 0)
    x = renoise(student, noise(), time_uniform(steps), noise)
    assert x.mean().item() == pytest.approx(m, abs=5e-3)
    assert x.std().item() == pytest.approx(k, abs=5e-3)
    assert student.nfe == steps
