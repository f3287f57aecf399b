"""Diversity and similarity of the samples of one condition, by hand."""

from __future__ import annotations

import pytest
import torch
from random_sets import normal

from fewstep.core.errors import UserError
from fewstep.eval.metrics.diversity import cross_seed_diversity
from fewstep.eval.metrics.similarity import in_batch_similarity


def test_diversity_by_hand() -> None:
    """Three seeds of two conditions: distances 3, 4, 5 for the first, none for the second."""
    first = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    second = torch.ones(3, 2)
    assert cross_seed_diversity(torch.stack([first, second], dim=1)) == pytest.approx((3 + 4 + 5) / 3 / 2)


def test_diversity_compares_seeds_not_conditions() -> None:
    assert cross_seed_diversity(normal(1, 20, 3).repeat(4, 1, 1)) == 0


def test_samples_of_one_condition_differ_by_the_mean_distance_of_pairs() -> None:
    samples = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    assert cross_seed_diversity(samples[:, None]) == pytest.approx((3 + 4 + 5) / 3)
    many = normal(1, 1000, 3)[0]
    expected = torch.pdist(many).mean().item()
    assert cross_seed_diversity(many.reshape(50, 20, 3)) == pytest.approx(expected, rel=0.02)


def test_similarity_of_equal_and_of_orthogonal_samples() -> None:
    one = torch.eye(4)[None]
    assert in_batch_similarity(one.repeat(3, 1, 1)) == pytest.approx(1)
    assert in_batch_similarity(torch.cat([one, one.roll(1, 1)])) == pytest.approx(0)


@pytest.mark.parametrize("metric", [cross_seed_diversity, in_batch_similarity])
def test_a_single_seed_is_refused(metric: object) -> None:
    with pytest.raises(UserError, match="seeds >= 2"):
        metric(normal(1, 20, 3))  # type: ignore[operator]
