"""How much the samples of one condition differ from seed to seed: few-step students lose this first."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import matrices


def cross_seed_diversity(features: Tensor) -> float:
    """Mean Euclidean distance between the samples of two different seeds for one condition, over pairs and conditions.

    ``features`` [S, N, D]: S >= 2 seeds of the same N conditions. In the units of the features, 0 when the seed has no
    effect; to judge a student, divide by its teacher's value. Raises ``UserError`` on NaN or infinite features.
    """
    if features.ndim != 3 or len(features) < 2:
        raise UserError(f"Diversity needs features [seeds >= 2, conditions, D], got {list(features.shape)}.")
    seeds = matrices(*features)
    return float(torch.stack([(a - b).norm(dim=1).mean() for a, b in combinations(seeds, 2)]).mean())


def in_batch_similarity(features: Tensor) -> float:
    """Mean cosine between the samples of one condition, over pairs and conditions: ``features`` [S, N, D] as above. 1
    when the seed has no effect (what few-step papers report of DINO or CLIP embeddings)."""
    if features.ndim != 3 or len(features) < 2:
        raise UserError(f"Similarity needs features [seeds >= 2, conditions, D], got {list(features.shape)}.")
    seeds = [F.normalize(each, dim=1) for each in matrices(*features)]
    return float(torch.stack([(a * b).sum(1).mean() for a, b in combinations(seeds, 2)]).mean())
