"""The Vendi score by closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from random_sets import normal

from fewstep.core.errors import UserError
from fewstep.eval.metrics.jackknife import GROUPS, groups_of, jackknife_error
from fewstep.eval.metrics.vendi import mean_vendi_score, vendi_error, vendi_score


@pytest.mark.parametrize("dimension", [8, 40], ids=["fewer dimensions than images", "more"])
def test_k_equal_groups_of_equal_images_count_as_k(dimension: int) -> None:
    """Between 1 (all equal) and the number of images (all orthogonal), whatever the length of the features."""
    lengths = torch.arange(1.0, 13).double()[:, None]
    for k in (1, 2, 3, 6):
        groups = torch.eye(dimension).double()[torch.arange(12) % k]
        assert vendi_score(lengths * groups) == pytest.approx(k, rel=1e-9)
    assert vendi_score(torch.linalg.qr(normal(dimension, dimension)).Q) == pytest.approx(dimension, rel=1e-9)


def test_groups_of_unequal_size_count_by_their_entropy() -> None:
    groups = torch.eye(5).double()[[0] * 6 + [1] * 3 + [2]]
    shares = (0.6, 0.3, 0.1)
    assert vendi_score(groups) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_two_images_by_hand() -> None:
    """With cosine c the eigenvalues of K / 2 are (1 + c) / 2 and (1 - c) / 2."""
    c = 0.6
    high, low = (1 + c) / 2, (1 - c) / 2
    expected = high**-high * low**-low
    assert vendi_score(torch.tensor([[1.0, 0.0], [2 * c, 2 * 0.8]])) == pytest.approx(expected, rel=1e-6)


def test_it_equals_the_papers_definition_on_the_kernel_of_all_pairs() -> None:
    x = normal(30, 6) + 1
    unit = x / x.norm(dim=1, keepdim=True)
    l = torch.linalg.eigvalsh(unit @ unit.T / 30).clamp(min=1e-300)  # noqa: E741
    assert vendi_score(x) == pytest.approx(float((-(l * l.log()).sum()).exp()), rel=1e-9)


def test_per_condition_it_is_the_mean_over_conditions() -> None:
    """Three conditions with 1, 2 and 4 different images each, although all twelve differ between conditions."""
    kinds = torch.tensor([[0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]])  # [seeds, conditions]
    features = torch.eye(7).double()[kinds]
    assert mean_vendi_score(features) == pytest.approx((1 + 2 + 4) / 3)


@pytest.mark.parametrize("conditions", [0, 3])
def test_the_error_is_the_jackknife_over_the_groups(conditions: int) -> None:
    features = normal(60, 5) + 1
    groups = groups_of(torch.arange(60), conditions or 1)
    left_out = [vendi_score(features[groups != group]) for group in range(GROUPS)]
    assert vendi_error(features, conditions) == pytest.approx(jackknife_error(left_out), rel=1e-6)
    assert vendi_error(features[:19], conditions) is None


@pytest.mark.parametrize("shape", [(4, 2_000_000), (2_000_000, 4)])
def test_the_smaller_of_the_two_products_is_computed(shape: tuple[int, int]) -> None:
    """The larger one would need 32 TB."""
    assert vendi_score(torch.eye(4).repeat(shape[0] // 4, shape[1] // 4)) == pytest.approx(4)


def test_features_without_a_direction_are_refused() -> None:
    x = normal(5, 3)
    x[2] = 0
    with pytest.raises(UserError, match="features of 1 of 5 images are zero"):
        vendi_score(x)
    x[2] = math.nan
    with pytest.raises(UserError, match="NaN"):
        vendi_score(x)
