"""The Inception Score in closed form and against torch-fidelity."""

from __future__ import annotations

import pytest
import torch
from random_sets import normal

from fewstep.core.errors import UserError
from fewstep.eval.metrics.inception_score import inception_score


def test_inception_scores_of_uniform_one_and_all_classes() -> None:
    assert inception_score(torch.full((20, 5), 0.2), 2) == pytest.approx(1)
    assert inception_score(torch.eye(5).repeat(4, 1), 2) == pytest.approx(5)
    assert inception_score(torch.eye(5)[:1].repeat(20, 1), 2) == pytest.approx(1)
    with pytest.raises(UserError, match="rows of probabilities"):
        inception_score(torch.ones(20, 5))


def test_the_inception_score_equals_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 2 * normal(57, 9)
    theirs = isc_features_to_metric(logits, splits=5, shuffle=False)["inception_score_mean"]
    assert inception_score(logits.softmax(1), splits=5) == pytest.approx(theirs, rel=1e-9)
