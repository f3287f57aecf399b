"""The Inception Score in closed form and against torch-fidelity."""

from __future__ import annotations

import pytest
import torch
from random_sets import normal

from fewstep.core.errors import UserError
from fewstep.eval.metrics.inception_score import inception_score, split_scores


def test_inception_scores_of_uniform_and_one_class() -> None:
    assert inception_score(torch.full((20, 5), 0.2), 2) == pytest.approx(1)
    assert inception_score(torch.eye(5)[:1].repeat(20, 1), 2) == pytest.approx(1)
    with pytest.raises(UserError, match="rows of probabilities"):
        inception_score(torch.ones(20, 5))


def test_the_order_of_images_does_not_change_the_inception_score() -> None:
    """Without shuffling, images ordered by class would have splits of a single class, whose score is 1."""
    ordered = torch.eye(5).repeat_interleave(400, dim=0)
    assert inception_score(ordered) == pytest.approx(5, rel=0.02)
    assert inception_score(ordered) == inception_score(ordered)


def test_rows_that_are_no_probabilities_are_refused() -> None:
    for rows in (torch.full((20, 2), 0.49), torch.tensor([[1.5, -0.5]]).repeat(20, 1), torch.full((9, 2), 0.5)):
        with pytest.raises(UserError, match="rows of probabilities"):
            split_scores(rows)
    assert split_scores(torch.full((20, 2), 0.5002)).mean().item() == pytest.approx(1), "rounding is allowed"


def test_the_seed_shuffles_the_images_into_splits() -> None:
    """Each split's score by hand: exp of the mean of sum p log(p / mean p)."""
    p = normal(23, 4).softmax(1)
    for seed in (0, 5):
        shuffled = p[torch.randperm(23, generator=torch.Generator().manual_seed(seed))]
        parts = [shuffled[k * 23 // 3 : (k + 1) * 23 // 3] for k in range(3)]
        expected = [(part * (part / part.mean(0)).log()).sum(1).mean().exp().item() for part in parts]
        assert split_scores(p, 3, seed).tolist() == pytest.approx(expected)
        assert inception_score(p, 3, seed) == pytest.approx(sum(expected) / 3)
    assert torch.equal(split_scores(p), split_scores(p, 10, seed=0)), "the seed of every score is the same"
    assert inception_score(p) == inception_score(p, 10, seed=0)


def test_the_inception_score_equals_torch_fidelitys() -> None:
    """In one split, because the two shuffle by different generators."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * normal(57, 9)
    theirs = isc_features_to_metric(logits, splits=1, shuffle=True)["inception_score_mean"]
    assert inception_score(logits.softmax(1), splits=1) == pytest.approx(theirs, rel=1e-9)
    shuffled = logits[torch.randperm(57, generator=torch.Generator().manual_seed(3))]
    theirs = isc_features_to_metric(shuffled, splits=5, shuffle=False)
    scores = split_scores(logits.softmax(1), splits=5, seed=3)
    assert float(scores.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert float(scores.std(correction=0)) == pytest.approx(theirs["inception_score_std"], rel=1e-9)
