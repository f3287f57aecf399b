"""How much the samples of one condition differ from seed to seed: few-step students lose this first."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.eval.features import matrices


def cross_seed_diversity(features: Tensor) -> float:
    """Mean Euclidean distance between the samples of two different seeds for one condition, over pairs and conditions.

    ``features`` [S, N, D]: S >= 2 seeds of the same N conditions. In the units of the features, 0 when the seed has no
    effect; to judge a student, divide by its teacher's value. Raises ``UserError`` on NaN or infinite features.
    """
    if features.ndim != 3 or len(features) < 2:
        raise UserError(f"Diversity needs features [seeds >= 2, conditions, D], got {list(features.shape)}.")
    seeds = matrices(*features)
    return float(torch.stack([(a - b).norm(dim=1).mean() for a, b in combinations(seeds, 2)]).mean())
