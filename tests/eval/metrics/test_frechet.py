"""The Fréchet distance, the statistics it compares, and its bias, against closed forms and scipy."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_sets import normal
from scipy.linalg import sqrtm
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.frechet import (
    Moments,
    Statistics,
    frechet_distance,
    frechet_error,
    grouped_moments,
    small_sample_bias,
)
from fewstep.eval.metrics.jackknife import GROUPS, groups_of, jackknife_error
from fewstep.eval.references import load_reference


def fd(x: Tensor, y: Tensor) -> float:
    return frechet_distance(Statistics.of(x), Statistics.of(y))


def gaussian(mean: Tensor, covariance: Tensor) -> Statistics:
    return Statistics(mean, covariance, count=1000)


def test_statistics_divide_by_n_minus_1() -> None:
    s = Statistics.of(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    assert s.mean.tolist() == [1, 3]
    assert s.covariance.tolist() == [[2, 4], [4, 8]]
    assert (s.count, s.covariance.dtype) == (2, torch.float64)


def test_distance_of_diagonal_covariances() -> None:
    """``sum (m1 - m2)^2 + sum (sqrt a - sqrt b)^2``"""
    a = gaussian(torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([4.0, 9.0, 0.25]).double().diag())
    b = gaussian(torch.tensor([0.0, 3.0, 2.0]).double(), torch.tensor([1.0, 16.0, 0.0]).double().diag())
    assert frechet_distance(a, b) == pytest.approx(1 + 9 + 0 + 1 + 1 + 0.25, abs=1e-12)


def test_distance_of_scaled_covariances() -> None:
    """``S2 = c^2 S1`` gives ``(c - 1)^2 tr S1``, whatever the directions."""
    covariance = Statistics.of(normal(50, 8) @ normal(8, 8, seed=1)).covariance
    zero = torch.zeros(8).double()
    distance = frechet_distance(gaussian(zero, covariance), gaussian(zero, 9 * covariance))
    assert distance == pytest.approx(4 * float(covariance.trace()), rel=1e-12)


def test_distance_of_covariances_that_do_not_commute() -> None:
    """In two dimensions ``tr (A B)^{1/2} = sqrt(tr(A B) + 2 sqrt(det(A B)))``."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 4.0]]).double()
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a @ b))))
    zero = torch.zeros(2).double()
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(2 + 3 + 1 + 4 - 2 * root, rel=1e-12)


def test_translation_adds_its_squared_length() -> None:
    x, v = normal(300, 5), torch.tensor([3.0, 0.0, -4.0, 0.0, 12.0])
    assert fd(x, x + v) == pytest.approx(169, rel=1e-10)


def test_rotation_does_not_change_the_distance() -> None:
    x, y = normal(300, 6) * torch.arange(1.0, 7), normal(300, 6, seed=1) + 1
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    assert fd(x @ rotation, y @ rotation) == pytest.approx(fd(x, y), rel=1e-10)


def test_the_distance_is_symmetric() -> None:
    x, y = normal(300, 6) * torch.arange(1.0, 7), normal(300, 6, seed=1) + 1
    assert fd(x, y) == pytest.approx(fd(y, x), rel=1e-10)


@pytest.mark.parametrize("n", [2000, 20], ids=["full rank", "fewer samples than dimensions"])
def test_the_distance_to_itself_is_zero(n: int) -> None:
    x = 10 * normal(n, 64)
    assert 0 <= fd(x, x) < 1e-5


def test_distance_of_rank_deficient_covariances() -> None:
    """Two Gaussians in orthogonal planes have no overlap: the traces add."""
    x, y = torch.zeros(500, 40).double(), torch.zeros(500, 40).double()
    x[:, :2], y[:, 2:4] = normal(500, 2), normal(500, 2, seed=1)
    a, b = Statistics.of(x), Statistics.of(y)
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_single_precision_features_are_summed_in_double() -> None:
    x, y = normal(2000, 8), normal(2000, 8, seed=1)
    offset = 1e4
    assert fd((x + offset).float(), (y + offset).float()) == pytest.approx(fd(x, y), rel=0.05)


@pytest.mark.parametrize("n", [300, 40], ids=["full rank", "fewer samples than dimensions"])
def test_the_distance_equals_scipys(n: int) -> None:
    """With the trace of scipy's root of the product, which the original FID code computes."""
    a, b = (Statistics.of(normal(n, 64, seed=seed) @ normal(64, 64, seed=2)) for seed in (0, 1))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_statistics_of_different_networks_are_refused() -> None:
    with pytest.raises(UserError, match="not comparable"):
        fd(normal(10, 3), normal(10, 4))


def test_invalid_statistics_are_refused() -> None:
    with pytest.raises(UserError, match=r"A mean \[D\] and a covariance \[D, D\] are needed, got \[3\] and \[3, 2\]"):
        Statistics(torch.zeros(3), torch.zeros(3, 2), 10)
    with pytest.raises(UserError, match=r"^The mean or covariance of the features contains NaN"):
        Statistics(torch.zeros(2), torch.tensor([[1.0, math.nan], [0.0, 1.0]]), 10)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5))
def test_moments_of_parts_merged_in_any_order_equal_those_of_the_full_set(sizes: list[int], seed: int) -> None:
    x = 100 + normal(sum(sizes) + 2, 5, seed=seed)
    parts = [Moments.of(part) for part in x.split([*sizes, 2])]
    random.Random(seed).shuffle(parts)
    merged, full = sum(parts[1:], parts[0]).statistics, Statistics.of(x)
    assert merged.count == full.count
    torch.testing.assert_close(merged.mean, full.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, full.covariance, rtol=1e-9, atol=1e-9)


def test_moments_of_one_sample_or_of_nan_are_refused() -> None:
    with pytest.raises(UserError, match="at least two samples"):
        _ = Moments.of(normal(1, 3)).statistics
    with pytest.raises(UserError, match="NaN"):
        Moments.of(torch.full((2, 3), math.nan))


def test_the_measured_bias_is_that_of_the_closed_form() -> None:
    """Two sets of n from N(0, I_d) are ``2d/n + d(d+1)/(2n)`` apart: 2.208 for d = 64 and n = 1000."""
    repeats = [fd(normal(1000, 64, seed=2 * i), normal(1000, 64, seed=2 * i + 1)) for i in range(4)]
    assert sum(repeats) / 4 == pytest.approx(2.208, abs=0.05)


@pytest.mark.parametrize(("d", "n"), [(64, 1000), (64, 65), (64, 25), (300, 5), (8, 2)])
@pytest.mark.parametrize("decay", [0.0, 1.0], ids=["identity", "decaying spectrum"])
def test_the_bias_is_the_distance_of_so_few_samples_of_the_same_distribution(d: int, n: int, decay: float) -> None:
    """For n above and far below D: the first order in 1/n is 3 times too large for D = 512, n = 25."""
    variances = torch.arange(1, d + 1).double() ** -decay
    reference = Statistics(torch.zeros(d).double(), variances.diag(), 0)
    repeats = 40 if n > 2 else 400
    measured = [
        frechet_distance(Statistics.of(normal(n, d, seed=k) * variances.sqrt()), reference) for k in range(repeats)
    ]
    assert small_sample_bias(reference, n) == pytest.approx(sum(measured) / repeats, rel=0.06)


def test_the_bias_of_many_samples_is_the_first_order_in_their_number() -> None:
    """``d/n + d(d+1)/(4n)`` for unit covariance against an exact reference: 1.104 for d = 64 and n = 1000."""
    reference = Statistics(torch.zeros(64).double(), torch.eye(64).double(), 0)
    assert small_sample_bias(reference, 1000) == pytest.approx(1.104, rel=0.03)


def test_real_images_of_the_bundled_reference_score_their_bias() -> None:
    """Its features are not Gaussian, but nearly."""
    real = load_reference("fashion")
    rows = [torch.randperm(len(real.features), generator=torch.Generator().manual_seed(k))[:25] for k in range(20)]
    measured = sum(frechet_distance(Statistics.of(real.features[r]), real.statistics) for r in rows) / 20
    assert small_sample_bias(real.statistics, 25) == pytest.approx(measured, rel=0.15)


def test_a_sigma_that_is_no_covariance_is_refused() -> None:
    """Its distance would be clamped to 0, which looks perfect."""
    zero, identity = torch.zeros(3).double(), torch.eye(3).double()
    with pytest.raises(UserError, match="variance below 0"):
        Statistics(zero, -identity, 10)
    indefinite = identity.clone()
    indefinite[0, 1] = indefinite[1, 0] = 2
    skewed = identity.clone()
    skewed[0, 1] = 0.5
    for sigma in (indefinite, skewed):
        with pytest.raises(UserError, match=r"a\.npz: sigma is not a covariance"):
            Statistics(zero, sigma, 10).check_semidefinite("a.npz")
    rounded = Statistics.of(normal(5, 40)).covariance.float().double()
    Statistics(torch.zeros(40).double(), rounded, 5).check_semidefinite("singular, in single precision")


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_sigma_may_be_wrong_by_a_thousandth_of_its_size(scale: float) -> None:
    """That is rounding: asymmetry relative to the largest entry, eigenvalues below 0 to the largest eigenvalue."""
    rotation = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2**0.5, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64) / 2**0.5
    for share, allowed in ((8e-4, True), (1.2e-3, False)):
        skewed = torch.eye(3, dtype=torch.float64)
        skewed[0, 2] = share
        values = torch.tensor([-4 * share, 1.0, 4.0], dtype=torch.float64)
        for sigma in (skewed, rotation @ torch.diag(values) @ rotation.T):
            statistics = gaussian(torch.zeros(3).double(), scale * sigma)
            if allowed:
                statistics.check_semidefinite("rounded")
            else:
                with pytest.raises(UserError, match="sigma is not a covariance"):
                    statistics.check_semidefinite("a.npz")


def test_the_extreme_eigenvalues_of_a_wrong_sigma_are_named_and_a_constant_feature_is_allowed() -> None:
    sigma = torch.tensor([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(UserError, match=r"eigenvalues from -2 to 4, asymmetry 0\)"):
        gaussian(torch.zeros(3).double(), sigma).check_semidefinite("a.npz")
    gaussian(torch.zeros(3).double(), 0 * sigma).check_semidefinite("constant")


def test_the_bias_of_one_feature_is_that_of_chi_square() -> None:
    """D = 1: E (sqrt(l) - s)^2 + l / n = 2 l (1 - E chi_k / sqrt(k)) + l / n, k = n - 1; without variance, 0."""
    for n in (2, 3, 10):
        k = n - 1
        mean_root = math.sqrt(2 / k) * math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2))
        reference = gaussian(torch.zeros(1).double(), torch.tensor([[0.3]]).double())
        expected = 0.3 * (2 * (1 - mean_root) + 1 / n)
        assert small_sample_bias(reference, n) == pytest.approx(expected, rel=0.05)
    assert small_sample_bias(gaussian(torch.zeros(2).double(), torch.zeros(2, 2).double()), 5) == 0


@pytest.mark.parametrize("conditions", [0, 3])
def test_the_error_is_the_jackknife_over_the_groups(conditions: int) -> None:
    features, reference = normal(60, 3) + 1, gaussian(torch.zeros(3).double(), torch.eye(3).double())
    groups = groups_of(torch.arange(60), conditions or 1)
    moments = grouped_moments(features, conditions) if conditions else grouped_moments(features)
    for group in range(GROUPS):
        part = Moments.of(features[groups == group])
        assert moments[group].count == part.count
        torch.testing.assert_close(moments[group].mean, part.mean)
    left_out = [frechet_distance(Statistics.of(features[groups != group]), reference) for group in range(GROUPS)]
    assert frechet_error(moments, reference) == pytest.approx(jackknife_error(left_out), rel=1e-6)


@pytest.mark.parametrize("n", [3, 4, 9])
def test_the_bias_of_unequal_features_is_the_mean_distance_of_small_sets(n: int) -> None:
    reference = gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 0.3, 0.05])).double())
    x = normal(2000 * n, 3).reshape(2000, n, 3) * reference.covariance.diagonal().sqrt()
    measured = sum(frechet_distance(Statistics.of(each), reference) for each in x) / 2000
    assert small_sample_bias(reference, n) == pytest.approx(measured, rel=0.06)
