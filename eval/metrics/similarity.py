"""In-batch similarity: the cosine between samples of one condition, which few-step papers report for DINO or CLIP."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_matrices


def in_batch_similarity(features: Tensor) -> float:
    """Mean cosine between samples of one condition, over all pairs of seeds and all conditions, in -1..1.

    ``features`` [S, N, D]: S >= 2 seeds of the same N conditions. 1 if the seed has no effect. Raises ``UserError`` on
    NaN or infinite features.
    """
    if features.ndim != 3 or len(features) < 2:
        raise UserError(f"Similarity needs features [seeds >= 2, conditions, D], got {list(features.shape)}.")
    seeds = [F.normalize(each, dim=1) for each in as_matrices(*features)]
    return float(torch.stack([(a * b).sum(1).mean() for a, b in combinations(seeds, 2)]).mean())


def _compute(inputs: MetricInput) -> float:
    return in_batch_similarity(inputs.features_by_seed())


SIMILARITY = Metric(
    name="similarity", network="clip", direction="lower", minimum_n=2, compute=_compute, needs_features=True,
    per_condition=True, computation="mean cosine of images of one class or caption",
)  # fmt: skip
