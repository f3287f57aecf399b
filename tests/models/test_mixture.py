"""The Gaussian mixture, checked against autograd, quadrature, Bayes' rule and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance, guide
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPCosine, VPDiscrete, VPLinear

SCHEDULES = [RectifiedFlow(), VPLinear(), VPCosine(), VPDiscrete.scaled_linear(), VE()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
LEVELS = [(0.9, 0.1), (0.5, 0.5), (0.05, 1.0), (1.0, 30.0)]

PLANE = GaussianMixture([1.0, 2.0, 1.0], [[-1.0, 0.5], [2.0, 0.0], [0.3, -1.5]], [0.3, 0.5, 0.2], labels=[0, 1, 0])
LINE = GaussianMixture([0.2, 0.5, 0.3], [[-2.0], [0.1], [1.4]], [0.4, 0.2, 0.6])


def points(n: int, alpha: float, sigma: float) -> Tensor:
    """Points [n, 2] of the diffused mixture."""
    return alpha * PLANE.sample(n, 1) + sigma * torch.randn(
        n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )


# ---- density, score and posterior mean


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 0, 1])])
def test_score_is_the_gradient_of_the_log_density(alpha: float, sigma: float, labels: Tensor | None) -> None:
    x_t = points(5, alpha, sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(PLANE.log_density(x_t, alpha, sigma, labels).sum(), x_t)
    assert_close(PLANE.score(x_t, alpha, sigma, labels), gradient)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_posterior_mean_and_score_satisfy_tweedies_formula(alpha: float, sigma: float) -> None:
    x_t = points(5, alpha, sigma)
    tweedie = (x_t + sigma**2 * PLANE.score(x_t, alpha, sigma)) / alpha
    assert_close(PLANE.x0(x_t, alpha, sigma), tweedie, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.9, 0.1), (0.5, 0.5), (0.1, 1.0)])
def test_density_and_posterior_mean_equal_quadrature(alpha: float, sigma: float) -> None:
    """``p(x_t) = int p(x0) N(x_t; alpha x0, sigma^2) dx0`` and its first moment, from the clean density alone."""
    x0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    clean = LINE.log_density(x0[:, None], 1.0, 0.0).exp()
    x_t = torch.tensor([-1.7, 0.0, 0.4, 2.0], dtype=torch.float64)[:, None]
    joint = clean * torch.exp(-((x_t - alpha * x0) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    evidence = torch.trapezoid(joint, x0)
    assert_close(LINE.log_density(x_t, alpha, sigma).exp(), evidence)
    assert_close(LINE.x0(x_t, alpha, sigma)[:, 0], torch.trapezoid(x0 * joint, x0) / evidence)


def test_weights_are_normalised_and_the_density_integrates_to_one() -> None:
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = GaussianMixture([2, 5, 3], LINE.means, LINE.stds).log_density(x[:, None], 1.0, 0.0).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1)
    assert_close(density, LINE.log_density(x[:, None], 1.0, 0.0).exp())


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_one_gaussian_has_the_textbook_posterior(t: float) -> None:
    """``m + alpha S^2 / v (x_t - alpha m)`` with ``v = alpha^2 S^2 + sigma^2``."""
    m, s, alpha, sigma = 1.0, 0.8, 1 - t, t
    x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    v = alpha**2 * s**2 + sigma**2
    gaussian = GaussianMixture.single(m, s)
    assert_close(gaussian.x0(x_t, alpha, sigma), m + alpha * s**2 / v * (x_t - alpha * m))
    assert_close(gaussian.score(x_t, alpha, sigma), -(x_t - alpha * m) / v)


@pytest.mark.parametrize(("t", "gap"), [(0.2, -0.1334520), (0.5, -0.9146341), (0.9, -1.4882410)])
def test_the_distribution_matching_gradient_between_two_gaussians_has_its_closed_form(t: float, gap: float) -> None:
    """Mean of ``x0_fake - x0_real`` over samples of the fake, N(-.5, .5^2), for N(1, .8^2): affine, so at its mean."""
    real, fake = GaussianMixture.single(1.0, 0.8), GaussianMixture.single(-0.5, 0.5)
    x_t = torch.tensor([[(1 - t) * -0.5]])
    assert (fake.x0(x_t, 1 - t, t) - real.x0(x_t, 1 - t, t)).item() == pytest.approx(gap, abs=1e-7)


def test_single_repeats_a_number_for_all_dimensions() -> None:
    assert GaussianMixture.single(2.0, 1.0, 3).means.tolist() == [[2, 2, 2]]
    assert GaussianMixture.single([1.0, 2.0], 1.0).means.tolist() == [[1, 2]]


# ---- boundary cases and extremes


def test_clean_and_pure_noise_are_exact() -> None:
    x = points(4, 1.0, 0.0)
    assert_close(PLANE.x0(0.7 * x, 0.7, 0.0), x)  # no noise: x_t / alpha
    mean = torch.tensor([[0.825, -0.25]], dtype=torch.float64).expand(4, 2)  # pure noise: the mean of the data
    assert_close(PLANE.x0(x, 0.0, 1.0), mean)
    assert_close(PLANE.score(x, 0.0, 2.0), -x / 4)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 1e-8), (1.0, 0.0), (1e-8, 1.0), (1.0, 1e4)])
@pytest.mark.parametrize("far", [1.0, 1e3, 1e6])
def test_nothing_overflows_far_from_every_component(alpha: float, sigma: float, far: float) -> None:
    x_t = torch.tensor([[far, -far]])
    for value in (PLANE.log_density(x_t, alpha, sigma), PLANE.score(x_t, alpha, sigma), PLANE.x0(x_t, alpha, sigma)):
        assert value.isfinite().all()


def test_point_masses_are_allowed_with_noise() -> None:
    """Data on {-1, 1} with equal weights: the posterior mean is ``tanh(alpha x_t / sigma^2)``."""
    coin = GaussianMixture([1, 1], [[-1.0], [1.0]], [0.0, 0.0])
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    assert_close(coin.x0(x_t, 0.5, 0.7), torch.tanh(0.5 * x_t / 0.49))


# ---- classes


def test_a_class_is_the_mixture_of_its_components() -> None:
    zero = GaussianMixture([1.0, 1.0], PLANE.means[[0, 2]], PLANE.stds[[0, 2]])
    one = GaussianMixture.single([2.0, 0.0], 0.5)
    x_t = points(6, 0.6, 0.4)
    for label, alone in ((0, zero), (1, one)):
        labels = torch.full((6,), label)
        assert_close(PLANE.log_density(x_t, 0.6, 0.4, labels), alone.log_density(x_t, 0.6, 0.4))
        assert_close(PLANE.x0(x_t, 0.6, 0.4, labels), alone.x0(x_t, 0.6, 0.4))


def test_the_null_label_is_the_mixture_of_all_classes() -> None:
    """``p(x) = sum_c p(c) p(x | c)`` with p(c) = 1/2 here."""
    x_t = points(6, 0.6, 0.4)
    by_class = [PLANE.log_density(x_t, 0.6, 0.4, torch.full((6,), c)).exp() for c in range(3)]
    assert PLANE.classes == 2
    assert_close(by_class[2], (by_class[0] + by_class[1]) / 2)
    assert_close(by_class[2].log(), PLANE.log_density(x_t, 0.6, 0.4))


@pytest.mark.parametrize("labels", [[0, 1], [0, 2, 0], [-1, 0, 1]])
def test_every_class_needs_a_component_and_every_component_a_class(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="one entry per component, and each class a component"):
        GaussianMixture([1, 1, 1], PLANE.means, PLANE.stds, labels)


@pytest.mark.parametrize(("weights", "stds"), [([1.0, 1.0], [0.1] * 3), ([1.0] * 3, [0.1])])
def test_inconsistent_shapes_are_refused(weights: list[float], stds: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights \[K\], means \[K, D\] and stds \[K\]"):
        GaussianMixture(weights, PLANE.means, stds)


# ---- samples


def test_samples_have_the_moments_and_the_classes_of_the_mixture() -> None:
    x = PLANE.sample(200_000, 0)
    assert_close(x.mean(0), torch.tensor([0.825, -0.25], dtype=torch.float64), rtol=0, atol=0.02)
    second = (PLANE.log_weights[-1].exp()[:, None] * (PLANE.means**2 + PLANE.stds[:, None] ** 2)).sum(0)
    assert_close(x.square().mean(0), second, rtol=0.02, atol=0)
    ones = PLANE.sample(1000, 0, torch.ones(1000, dtype=torch.int64))
    assert_close(ones.mean(0), torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=0, atol=0.08)


def test_samples_depend_on_the_seed_alone() -> None:
    assert PLANE.sample(5, 3).equal(PLANE.sample(5, torch.Generator().manual_seed(3)))
    assert not PLANE.sample(5, 3).equal(PLANE.sample(5, 4))


# ---- the exact teacher


@every_schedule
@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 2, 1)])
def test_the_denoiser_of_a_mixture_is_exact_for_every_quantity(schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
    t = torch.tensor([0.05, 0.4, 0.7, 0.95], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    condition = Condition.of_labels(torch.tensor([0, 1, 2, 0]), PLANE.classes)
    x_t = points(4, 0.5, 0.5)
    teacher = Denoiser(MixtureBackbone(PLANE, schedule), schedule, "x0")
    prediction = teacher(x_t.reshape(shape), t, condition)
    assert prediction.x0.shape == shape
    assert_close(prediction.x0.reshape(4, 2), PLANE.x0(x_t, alpha, sigma, condition["labels"]))
    score = PLANE.score(x_t, alpha, sigma, condition["labels"])
    assert_close(prediction.score.reshape(4, 2), score, rtol=1e-8, atol=1e-8)
    assert_close(prediction.noise.reshape(4, 2), -sigma[:, None] * score, rtol=1e-8, atol=1e-8)


def test_the_teacher_returns_the_dtype_of_its_input() -> None:
    teacher = Denoiser(MixtureBackbone(PLANE, RectifiedFlow()), RectifiedFlow(), "x0")
    x_t = points(4, 0.5, 0.5)
    single = teacher(x_t.float(), 0.5, Condition())
    assert single.x0.dtype == torch.float32
    assert_close(single.x0, teacher(x_t, 0.5, Condition()).x0.float())
    assert list(teacher.parameters()) == []


def test_guidance_raises_the_probability_of_the_class() -> None:
    """The guided score is that of ``p(x)^(1 - w) p(x | c)^w``, which favours the class more as w grows."""
    schedule = RectifiedFlow()
    teacher = Denoiser(MixtureBackbone(PLANE, schedule), schedule, "x0")
    x_t = points(8, 0.5, 0.5)
    labels = torch.ones(8, dtype=torch.int64)
    guided = guide(teacher, x_t, 0.5, Condition.of_labels(labels, PLANE.classes), Guidance(3.0))
    leaf = x_t.clone().requires_grad_()
    density = 3 * PLANE.log_density(leaf, 0.5, 0.5, labels) - 2 * PLANE.log_density(leaf, 0.5, 0.5)
    (gradient,) = torch.autograd.grad(density.sum(), leaf)
    assert_close(guided.out.score, gradient)
