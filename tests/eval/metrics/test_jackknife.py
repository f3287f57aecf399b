"""Error bars within a score: each is compared with the deviation of the value over many independent sets of images."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_sets import normal
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.cmmd import cmmd_and_error
from fewstep.eval.metrics.frechet import (
    Moments,
    Statistics,
    frechet_distance,
    frechet_error,
    grouped_moments,
)
from fewstep.eval.metrics.jackknife import GROUPS, groups_of, jackknife_error, strata
from fewstep.eval.metrics.precision_recall import precision_error, precision_recall
from fewstep.eval.metrics.vendi import vendi_error, vendi_score

Measured = Callable[[Tensor], tuple[float, float | None]]  # features -> value, error


def reference(d: int) -> Statistics:
    return Statistics(torch.zeros(d).double(), torch.eye(d).double(), 0)


def features(n: int, d: int, seed: int) -> Tensor:
    """Normal, with standard deviations from 1.5 to 0.3 and a shifted mean."""
    return normal(n, d, seed=seed) * torch.linspace(1.5, 0.3, d).double() + 0.3


def fd(x: Tensor) -> tuple[float, float | None]:
    unit = reference(x.shape[1])
    return frechet_distance(Statistics.of(x), unit), frechet_error(grouped_moments(x), unit)


def near_fd(x: Tensor) -> tuple[float, float | None]:
    return fd(x - 0.2)


def vendi(x: Tensor) -> tuple[float, float | None]:
    return vendi_score(x), vendi_error(x)


def cmmd(x: Tensor) -> tuple[float, float | None]:
    return cmmd_and_error(F.normalize(normal(300, x.shape[1], seed=-1), dim=1), F.normalize(x, dim=1))


def precision(x: Tensor) -> tuple[float, float | None]:
    value, _ = precision_recall(normal(200, x.shape[1], seed=-1), x)
    return value, precision_error(value, len(x))


def deviation_and_error(measure: Measured, n: int, d: int, repeats: int) -> tuple[float, float]:
    """The standard deviation of a value over independent sets, and the mean of the error bars of these sets."""
    values, errors = zip(*(measure(features(n, d, seed)) for seed in range(repeats)), strict=True)
    assert None not in errors
    return statistics.stdev(values), statistics.fmean(errors)


@pytest.mark.parametrize(
    ("measure", "n", "d", "tolerance"),
    [
        (fd, 400, 16, 0.2), (fd, 400, 64, 0.2), (fd, 100, 64, 0.2), (fd, 40, 256, 0.2), (near_fd, 100, 64, 0.6),
        (vendi, 100, 16, 0.2), (vendi, 100, 150, 0.2), (cmmd, 200, 16, 0.2), (precision, 200, 4, 0.2),
    ],
)  # fmt: skip
def test_the_error_bar_is_the_deviation_over_independent_sets(
    measure: Measured, n: int, d: int, tolerance: float
) -> None:
    """It is too large only for a small Fréchet distance of few images, most of which is their bias."""
    deviation, error = deviation_and_error(measure, n, d, repeats=80)
    assert error == pytest.approx(deviation, rel=tolerance)
    assert error > 0.8 * deviation


def test_the_bootstrap_would_be_wrong_for_frechet_distances() -> None:
    """Its resamples have the bias of fewer images, in their mean and in their deviation."""
    deviation, _ = deviation_and_error(fd, 100, 64, repeats=80)
    x, generator = features(100, 64, 0), torch.Generator().manual_seed(0)
    resampled = [fd_of_rows(x, torch.randint(100, (100,), generator=generator)) for _ in range(40)]
    assert statistics.fmean(resampled) - fd(x)[0] > 10 * deviation
    assert statistics.stdev(resampled) > 2 * deviation


def fd_of_rows(x: Tensor, rows: Tensor) -> float:
    return frechet_distance(Statistics.of(x[rows]), reference(x.shape[1]))


def test_the_error_of_a_mean_is_the_deviation_of_the_groups_over_the_root_of_their_number() -> None:
    x = normal(1000)
    groups = groups_of(torch.arange(1000))
    means = torch.stack([x[groups == group].mean() for group in range(GROUPS)])
    left_out = [float(x[groups != group].mean()) for group in range(GROUPS)]
    assert jackknife_error(left_out) == pytest.approx(float(means.std()) / GROUPS**0.5, rel=1e-9)


def test_groups_are_always_the_same() -> None:
    """Error bars are comparable between runs and versions."""
    first = torch.rand(1009, 10, generator=torch.Generator().manual_seed(0)).argsort(1)[:2]
    assert torch.equal(groups_of(torch.arange(20)), first.flatten())


@pytest.mark.parametrize("n", [20, 27, 10_090, 25_003])
def test_groups_are_of_equal_size(n: int) -> None:
    counts = groups_of(torch.arange(n)).bincount(minlength=GROUPS)
    assert len(counts) == GROUPS
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("order", ["in turn", "sorted"])
def test_the_images_of_a_class_are_in_all_groups(classes: int, order: str) -> None:
    """Otherwise the error would be that of leaving out classes."""
    numbers = torch.arange(50 * classes)
    labels = numbers % classes if order == "in turn" else numbers // 50
    counts = (labels * GROUPS + groups_of(numbers)).bincount(minlength=classes * GROUPS).reshape(classes, GROUPS)
    assert counts.sum(1).tolist() == [50] * classes
    assert counts.max() < 25
    assert (counts > 0).sum(1).min() >= 6


@pytest.mark.parametrize(("n", "conditions"), [(400, 10), (1000, 100), (5000, 100)])
def test_groups_of_known_conditions_have_equally_many_images_of_each(n: int, conditions: int) -> None:
    numbers = torch.arange(n)
    groups = groups_of(numbers, strata(n, conditions))
    counts = (numbers % conditions * GROUPS + groups).bincount(minlength=conditions * GROUPS)
    assert counts.tolist() == [n // conditions // GROUPS] * (conditions * GROUPS)
    first = groups[:conditions].bincount(minlength=GROUPS)
    assert first.max() < 0.7 * conditions, "conditions do not share their permutation"


def test_conditions_that_are_unknown_or_have_too_few_images_are_ignored() -> None:
    assert strata(99, 0) == strata(99, 10) == 1
    assert strata(100, 10) == 10


@pytest.mark.parametrize(("measure", "factor"), [("fd", 2.0), ("vendi", 1.1)])
def test_the_error_bar_of_images_of_classes_in_turn_is_not_that_of_random_numbers_of_each(
    measure: str, factor: float
) -> None:
    """With distant classes, random numbers of each would increase the deviation by more than this factor."""
    means = 2 * normal(10, 32, seed=-2)
    values, errors, unknown = [], [], []
    for seed in range(60):
        x = means.repeat(40, 1) + 0.8 * normal(400, 32, seed=seed)
        if measure == "fd":
            unit = reference(32)
            values.append(frechet_distance(Statistics.of(x), unit))
            errors += [frechet_error(grouped_moments(x, 10), unit)]
            unknown += [frechet_error(grouped_moments(x), unit)]
        else:
            values.append(vendi_score(x))
            errors += [vendi_error(x, 10)]
            unknown += [vendi_error(x)]
    deviation = statistics.stdev(values)
    assert 0.8 * deviation < statistics.fmean(errors) < 1.5 * deviation
    assert statistics.fmean(unknown) > factor * deviation
    assert errors != unknown


def test_moments_without_a_part_are_those_of_the_rest() -> None:
    x = 100 + normal(60, 5)
    rest = (Moments.of(x) - Moments.of(x[:7])).statistics
    expected = Statistics.of(x[7:])
    assert rest.count == 53
    torch.testing.assert_close(rest.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(rest.covariance, expected.covariance, rtol=1e-9, atol=1e-9)


def test_features_that_only_one_group_has_leave_no_negative_variance() -> None:
    """Many features of images are zero for most of them."""
    sparse = (normal(60, 300) - 2).clamp(min=0)
    rest = (Moments.of(sparse) - Moments.of(sparse[:6])).statistics
    assert (sparse[6:].std(0) == 0).sum() > 50
    torch.testing.assert_close(rest.covariance, Statistics.of(sparse[6:]).covariance, rtol=0, atol=1e-15)
    assert (fd(sparse)[1] or 0) > 0


def test_so_few_images_that_a_group_has_no_spread_have_no_error_bar() -> None:
    for n in (2, 9, 19):
        assert frechet_error(grouped_moments(normal(n, 3)), reference(3)) is None
        assert vendi_error(normal(n, 3)) is None
    assert frechet_error(grouped_moments(normal(20, 3)), reference(3)) is not None
    assert vendi_error(normal(20, 3)) is not None
    assert frechet_error((), reference(3)) is None
    with pytest.raises(UserError, match="NaN"):
        grouped_moments(torch.full((30, 2), torch.nan))
