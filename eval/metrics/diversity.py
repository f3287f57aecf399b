"""Diversity: how much the samples of one condition differ from seed to seed. Few-step students lose this first."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_finite


def cross_seed_diversity(features: Tensor) -> float:
    """Mean Euclidean distance between samples of one condition, over all pairs of seeds and all conditions.

    ``features`` [S, N, D]: S >= 2 seeds of the same N conditions. In the units of the features, 0 if the seed has no
    effect; to judge a student, divide by its teacher's value. Raises ``UserError`` on NaN or infinite features.
    """
    if features.ndim != 3 or len(features) < 2:
        raise UserError(f"Diversity needs features [seeds >= 2, conditions, D], got {list(features.shape)}.")
    seeds = [as_finite(each) for each in features]
    return float(torch.stack([(a - b).norm(dim=1).mean() for a, b in combinations(seeds, 2)]).mean())


def _compute(inputs: MetricInput) -> float:
    return cross_seed_diversity(inputs.features_by_seed())


DIVERSITY = Metric(
    name="diversity", network="clip", direction="higher", minimum_n=2, compute=_compute, needs_features=True,
    per_condition=True, computation="mean distance of images of one class or caption",
)  # fmt: skip
