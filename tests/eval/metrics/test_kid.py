"""KID by hand, over random sets, and against torch-fidelity."""

from __future__ import annotations

import pytest
import torch
from random_sets import normal
from torch import Tensor

from fewstep.eval.feature_statistics import FeatureStatistics
from fewstep.eval.metrics.frechet import Statistics
from fewstep.eval.metrics.kid import KID, kid, kid_and_deviation, subset_values
from fewstep.eval.metrics.metric import MetricInput


def test_kid_by_hand() -> None:
    """Two rows of dimension 1, ``k(u, v) = (u v + 1)^3``:

    within x ``k(0, 1) = 1``, within y ``k(1, 2) = 27``, across ``mean(1, 1, 8, 27) = 9.25``.
    """
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kid(x, y) == pytest.approx(1 + 27 - 2 * 9.25)


def test_kid_divides_by_the_dimension() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kid(x.repeat(1, 7), y.repeat(1, 7)) == pytest.approx(kid(x, y))


def test_kid_of_one_distribution_averages_to_zero() -> None:
    """Unbiased: over pairs of samples both signs occur, and the mean is within its standard error of 0."""
    values = torch.tensor(
        [kid(normal(50, 4, seed=2 * i), normal(50, 4, seed=2 * i + 1), subsets=1) for i in range(400)]
    )
    assert abs(values.mean()) < 3 * values.std() / 20
    assert values.min() < 0 < values.max()


@pytest.mark.parametrize(("n", "m"), [(6, 14), (14, 6), (14, 14)])
def test_subsets_of_the_smaller_set_average_to_the_unbiased_value_of_all(n: int, m: int) -> None:
    """U-statistics: the mean over random subsets is the value with all pairs, each within-mean without its diagonal."""
    x, y = normal(n, 2), normal(m, 2, seed=1) + 0.5

    def mean(a: Tensor, b: Tensor, pairs: int) -> float:
        kernel = (a @ b.T / 2 + 1) ** 3
        return float((kernel.sum() - (kernel.trace() if a is b else 0)) / pairs)

    exact = mean(x, x, n * (n - 1)) + mean(y, y, m * (m - 1)) - 2 * mean(x, y, n * m)
    values = subset_values(x, y, subsets=4000, size=6)
    assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / 4000**0.5)
    assert values.std() > 0
    assert values.dtype == torch.float64, "the features, too, are summed in double precision"
    thousand = normal(1001, 1)
    assert torch.equal(subset_values(thousand, thousand, 1), subset_values(thousand, thousand, 1, size=1000))
    assert kid(thousand, thousand, 1) == kid(thousand, thousand, 1, size=1000, seed=0)
    whole = subset_values(x, y, subsets=2)
    assert torch.allclose(whole[0], whole[1]) == (n == m), "up to 1,000 rows"


def test_kid_grows_with_the_distance() -> None:
    x, y = normal(400, 4), normal(400, 4, seed=1)
    near, far = kid(x, y + 0.2, 10), kid(x, y + 0.6, 10)
    assert 0.02 < near < far / 4


def test_kid_depends_only_on_its_own_seed() -> None:
    x, y = normal(200, 4), normal(200, 4, seed=1)
    before = torch.get_rng_state()
    value = kid(x, y, subsets=3, size=50, seed=1)
    torch.manual_seed(5)
    assert kid(x, y, subsets=3, size=50, seed=1) == value
    assert kid(x, y, subsets=3, size=50, seed=2) != value
    torch.set_rng_state(before)


def test_kid_equals_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(60, 8), normal(60, 8, seed=1) + 0.3
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kid(x, y, subsets=1) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_equal_subsets_have_no_deviation() -> None:
    """Of two sets of one size below that of a subset, each subset is the whole set: 0 was no error of the value."""
    assert kid_and_deviation(normal(40, 4, seed=0), normal(40, 4, seed=1))[1] is None
    value, deviation = kid_and_deviation(normal(40, 4, seed=0), normal(60, 4, seed=1))
    assert value == kid(normal(40, 4, seed=0), normal(60, 4, seed=1))
    assert deviation is not None
    assert deviation > 1e-3


@pytest.mark.parametrize("n", [60, 100])
def test_a_score_without_a_deviation_has_no_error_bar(n: int) -> None:
    real = FeatureStatistics(Statistics.of(normal(60, 4, seed=0)), normal(60, 4, seed=0), None, None)
    images = FeatureStatistics(Statistics.of(normal(n, 4, seed=1)), normal(n, 4, seed=1), None, None)
    measured = KID.measure(MetricInput(images, real, {}, 0))
    assert (measured.error is None) == (measured.error_of is None) == (n == 60)
