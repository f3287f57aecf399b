"""Closed forms of the metrics: every number here is known without running them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.cmmd import cmmd
from fewstep.eval.metrics.diversity import cross_seed_diversity, in_batch_similarity
from fewstep.eval.metrics.frechet import Moments, Statistics, bias, frechet_distance, frechet_infinity
from fewstep.eval.metrics.inception_score import inception_score
from fewstep.eval.metrics.kid import kid
from fewstep.eval.metrics.precision_recall import density_coverage, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fd(x: Tensor, y: Tensor) -> float:
    return frechet_distance(Statistics.of(x), Statistics.of(y))


def law(mean: Tensor, covariance: Tensor) -> Statistics:
    return Statistics(mean, covariance, count=1000)


# Fréchet distance


def test_statistics_divide_by_n_minus_1() -> None:
    s = Statistics.of(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    assert s.mean.tolist() == [1, 3]
    assert s.covariance.tolist() == [[2, 4], [4, 8]]
    assert (s.count, s.covariance.dtype) == (2, torch.float64)


def test_diagonal_covariances() -> None:
    """``sum (m1 - m2)^2 + sum (sqrt a - sqrt b)^2``"""
    a = law(torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([4.0, 9.0, 0.25]).double().diag())
    b = law(torch.tensor([0.0, 3.0, 2.0]).double(), torch.tensor([1.0, 16.0, 0.0]).double().diag())
    assert frechet_distance(a, b) == pytest.approx(1 + 9 + 0 + 1 + 1 + 0.25, abs=1e-12)


def test_scaled_covariance() -> None:
    """``S2 = c^2 S1`` gives ``(c - 1)^2 tr S1``, whatever the directions."""
    covariance = Statistics.of(normal(50, 8) @ normal(8, 8, seed=1)).covariance
    zero = torch.zeros(8).double()
    distance = frechet_distance(law(zero, covariance), law(zero, 9 * covariance))
    assert distance == pytest.approx(4 * float(covariance.trace()), rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """In two dimensions ``tr (A B)^{1/2} = sqrt(tr(A B) + 2 sqrt(det(A B)))``."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 4.0]]).double()
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a @ b))))
    zero = torch.zeros(2).double()
    assert frechet_distance(law(zero, a), law(zero, b)) == pytest.approx(2 + 3 + 1 + 4 - 2 * root, rel=1e-12)


def test_translation_adds_its_squared_length() -> None:
    x, v = normal(300, 5), torch.tensor([3.0, 0.0, -4.0, 0.0, 12.0])
    assert fd(x, x + v) == pytest.approx(169, rel=1e-10)


def test_rotation_changes_nothing() -> None:
    x, y = normal(300, 6) * torch.arange(1.0, 7), normal(300, 6, seed=1) + 1
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    assert fd(x @ rotation, y @ rotation) == pytest.approx(fd(x, y), rel=1e-10)


def test_it_is_symmetric() -> None:
    x, y = normal(300, 6) * torch.arange(1.0, 7), normal(300, 6, seed=1) + 1
    assert fd(x, y) == pytest.approx(fd(y, x), rel=1e-10)


@pytest.mark.parametrize("n", [2000, 20], ids=["full rank", "fewer samples than dimensions"])
def test_distance_to_itself_is_zero(n: int) -> None:
    x = 10 * normal(n, 64)
    assert 0 <= fd(x, x) < 1e-5


def test_rank_deficient_covariances() -> None:
    """Two Gaussians in orthogonal planes have no overlap: the traces add."""
    x, y = torch.zeros(500, 40).double(), torch.zeros(500, 40).double()
    x[:, :2], y[:, 2:4] = normal(500, 2), normal(500, 2, seed=1)
    a, b = Statistics.of(x), Statistics.of(y)
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_bias_of_finite_samples() -> None:
    """Two sets of n from N(0, I_d) are ``2d/n + d(d+1)/(2n)`` apart: 2.208 for d = 64 and n = 1000."""
    repeats = [fd(normal(1000, 64, seed=2 * i), normal(1000, 64, seed=2 * i + 1)) for i in range(4)]
    assert sum(repeats) / 4 == pytest.approx(2.208, abs=0.05)


def test_single_precision_features_are_summed_in_double() -> None:
    x, y = normal(2000, 8), normal(2000, 8, seed=1)
    far = 1e4
    assert fd((x + far).float(), (y + far).float()) == pytest.approx(fd(x, y), rel=0.05)


def test_statistics_of_different_networks_are_refused() -> None:
    with pytest.raises(UserError, match="not comparable"):
        fd(normal(10, 3), normal(10, 4))


def test_statistics_that_are_damaged_are_refused() -> None:
    with pytest.raises(UserError, match="covariance"):
        Statistics(torch.zeros(3), torch.zeros(3, 2), 10)
    with pytest.raises(UserError, match="NaN"):
        Statistics(torch.zeros(2), torch.tensor([[1.0, math.nan], [0.0, 1.0]]), 10)


@pytest.mark.parametrize("n", [300, 40], ids=["full rank", "fewer samples than dimensions"])
def test_it_is_scipys(n: int) -> None:
    """With the trace of scipy's root of the product, which the FID's own code takes."""
    a, b = (Statistics.of(normal(n, 64, seed=seed) @ normal(64, 64, seed=2)) for seed in (0, 1))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5))
def test_moments_of_parts_in_any_order_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    x = 100 + normal(sum(sizes) + 2, 5, seed=seed)
    parts = [Moments.of(part) for part in x.split([*sizes, 2])]
    random.Random(seed).shuffle(parts)
    merged, whole = sum(parts[1:], parts[0]).statistics, Statistics.of(x)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)


def test_moments_of_one_sample_have_no_covariance_and_nan_none_at_all() -> None:
    with pytest.raises(UserError, match="two samples or more"):
        _ = Moments.of(normal(1, 3)).statistics
    with pytest.raises(UserError, match="NaN"):
        Moments.of(torch.full((2, 3), math.nan))


def test_the_bias_is_that_of_identity_covariance_in_closed_form() -> None:
    """``2d/n + d(d+1)/(2n)``; a set of unknown number counts as infinite, so half of it is left."""
    identity = torch.eye(64).double()
    both = bias(Statistics(torch.zeros(64).double(), identity, 1000), Statistics(torch.zeros(64), identity, 1000))
    assert both == pytest.approx(2.208)
    one = bias(Statistics(torch.zeros(64).double(), identity, 1000), Statistics(torch.zeros(64), identity, 0))
    assert one == pytest.approx(1.104)


def test_infinitely_many_samples_of_one_law_are_at_distance_zero() -> None:
    reference = Statistics(torch.zeros(16).double(), torch.eye(16).double(), 0)
    sets = [normal(4_000, 16, seed=seed) for seed in range(12)]
    plain = sum(frechet_distance(Statistics.of(x), reference) for x in sets) / 12
    extrapolated = sum(frechet_infinity(x, reference, least=1000) for x in sets) / 12
    assert abs(extrapolated) < plain / 6


# kernel distance


def test_kid_by_hand() -> None:
    """Two rows of dimension 1, ``k(u, v) = (u v + 1)^3``:

    within x ``k(0, 1) = 1``, within y ``k(1, 2) = 27``, across ``mean(1, 1, 8, 27) = 9.25``.
    """
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kid(x, y) == pytest.approx(1 + 27 - 2 * 9.25)


def test_kid_divides_by_the_dimension() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kid(x.repeat(1, 7), y.repeat(1, 7)) == pytest.approx(kid(x, y))


def test_kid_of_one_law_averages_to_zero() -> None:
    """Unbiased: over pairs of samples both signs occur, and the mean is within its standard error of 0."""
    values = torch.tensor(
        [kid(normal(50, 4, seed=2 * i), normal(50, 4, seed=2 * i + 1), subsets=1) for i in range(400)]
    )
    assert abs(values.mean()) < 3 * values.std() / 20
    assert values.min() < 0 < values.max()


def test_kid_grows_with_the_distance() -> None:
    x, y = normal(400, 4), normal(400, 4, seed=1)
    near, far = kid(x, y + 0.2, 10), kid(x, y + 0.6, 10)
    assert 0.02 < near < far / 4


def test_kid_depends_on_its_seed_alone() -> None:
    x, y = normal(200, 4), normal(200, 4, seed=1)
    before = torch.get_rng_state()
    value = kid(x, y, subsets=3, size=50, seed=1)
    torch.manual_seed(5)
    assert kid(x, y, subsets=3, size=50, seed=1) == value
    assert kid(x, y, subsets=3, size=50, seed=2) != value
    torch.set_rng_state(before)


def test_kid_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(60, 8), normal(60, 8, seed=1) + 0.3
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kid(x, y, subsets=1) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


# CMMD


def test_cmmd_of_single_pairs() -> None:
    """Unit vectors of cosine c: ``2000 (1 - exp(-(1 - c) / 100))``; 7.696 is that of c = 0.6145, 39.6 of opposites."""
    for cosine, expected in ((0.6145, 7.696), (-1.0, 39.603), (1.0, 0.0)):
        x = torch.tensor([[1.0, 0.0]]).repeat(2, 1)
        y = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]]).repeat(2, 1)
        assert cmmd(x, y) == pytest.approx(expected, abs=2e-3)


def test_the_parts_of_cmmd_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.nn.functional.normalize(normal(n, 6, seed=n), dim=1) for n in (50, 40))
    whole = cmmd(x, y)
    monkeypatch.setattr("fewstep.eval.metrics.cmmd.ROWS", 7)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-12)


# Inception Score


def test_inception_scores_of_uniform_one_and_all_classes() -> None:
    assert inception_score(torch.full((20, 5), 0.2), 2) == pytest.approx(1)
    assert inception_score(torch.eye(5).repeat(4, 1), 2) == pytest.approx(5)
    assert inception_score(torch.eye(5)[:1].repeat(20, 1), 2) == pytest.approx(1)
    with pytest.raises(UserError, match="rows of probabilities"):
        inception_score(torch.ones(20, 5))


def test_inception_score_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * normal(57, 9)
    theirs = isc_features_to_metric(logits, splits=5, shuffle=False)["inception_score_mean"]
    assert inception_score(logits.softmax(1), splits=5) == pytest.approx(theirs, rel=1e-9)


# precision and recall


def test_disjoint_clusters() -> None:
    assert precision_recall(normal(50, 3), normal(50, 3, seed=1) + 100) == (0, 0)


def test_identical_sets() -> None:
    assert precision_recall(normal(50, 3), normal(50, 3)) == (1, 1)


def test_one_real_point_over_and_over() -> None:
    """Perfectly real and not at all diverse: the generated balls have radius 0, so they hold that point at most."""
    real = normal(50, 3)
    precision, recall = precision_recall(real, real[:1].repeat(50, 1))
    assert (precision, recall <= 1 / 50) == (1, True)


def test_a_missing_mode_costs_recall_and_an_invented_one_precision() -> None:
    near, far = normal(60, 3), normal(20, 3, seed=1) + 100
    assert precision_recall(torch.cat([near, far]), near) == (1, 60 / 80)
    assert precision_recall(near, torch.cat([near, far])) == (60 / 80, 1)


@pytest.mark.parametrize(("k", "reached"), [(1, False), (2, True)])
def test_balls_reach_to_the_kth_neighbour_that_is_not_the_point_itself(k: int, reached: bool) -> None:
    """Real points 0, 1, 3: the ball around 3 reaches to 1 (k = 1) or 0 (k = 2), so up to 5 or 6: 5.5 lies between."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[5.5], [50.0], [60.0]])
    assert precision_recall(real, generated, k)[0] == (1 / 3 if reached else 0)


def test_the_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = normal(70, 3), normal(90, 3, seed=1) * 1.5
    whole = precision_recall(real, generated)
    monkeypatch.setattr("fewstep.eval.metrics.precision_recall.ROWS", 7)
    assert precision_recall(real, generated) == whole
    assert 0 < whole[0] < whole[1] <= 1  # too wide a generator: less precise than complete


def test_too_few_points_for_k_are_refused() -> None:
    with pytest.raises(UserError, match="k = 3"):
        precision_recall(normal(50, 2), normal(3, 2))


# diversity


def test_diversity_by_hand() -> None:
    """Three seeds of two conditions: distances 3, 4, 5 for the first, none for the second."""
    first = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    second = torch.ones(3, 2)
    assert cross_seed_diversity(torch.stack([first, second], dim=1)) == pytest.approx((3 + 4 + 5) / 3 / 2)


def test_diversity_looks_across_seeds_not_across_conditions() -> None:
    assert cross_seed_diversity(normal(1, 20, 3).repeat(4, 1, 1)) == 0


def test_diversity_needs_two_seeds() -> None:
    with pytest.raises(UserError, match="seeds >= 2"):
        cross_seed_diversity(normal(1, 20, 3))


# all of them


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "metric",
    [fd, kid, precision_recall, lambda x, y: cross_seed_diversity(torch.stack([x, y]))],
    ids=["frechet", "kid", "precision_recall", "diversity"],
)
def test_features_that_are_not_finite_are_refused(metric: Callable[[Tensor, Tensor], object], value: float) -> None:
    broken = normal(10, 3)
    broken[4, 1] = value
    with pytest.raises(UserError, match="1 of 10 images"):
        metric(normal(10, 3), broken)


@pytest.mark.parametrize("metric", [kid, precision_recall])
def test_features_of_different_networks_are_refused(metric: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(UserError, match="one D"):
        metric(normal(10, 3), normal(10, 4))


def test_density_and_coverage_by_hand() -> None:
    """Real points 0, 1, 3, 7 with k = 1 have balls of radius 1, 1, 2 and 4, open: 2 lies in that of 3 alone, 0.5 in
    those of 0 and 1, and 100 in none: (1 + 2) / 3, and three of four balls hold a point."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[2.0], [0.5], [100.0]])
    assert density_coverage(real, generated, k=1) == (pytest.approx(1), 0.75)


def test_density_of_one_law_is_one_and_an_outlier_does_not_raise_it() -> None:
    real, generated = normal(400, 2), normal(400, 2, seed=1)
    density, coverage = density_coverage(real, generated)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage > 0.9
    assert density_coverage(real, generated + 50) == (0, 0)


def test_similarity_of_the_same_and_of_orthogonal_samples() -> None:
    one = torch.eye(4)[None]
    assert in_batch_similarity(one.repeat(3, 1, 1)) == pytest.approx(1)
    assert in_batch_similarity(torch.cat([one, one.roll(1, 1)])) == pytest.approx(0)
    with pytest.raises(UserError, match="seeds >= 2"):
        in_batch_similarity(one)
