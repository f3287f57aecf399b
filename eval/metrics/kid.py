"""The kernel distance (KID of Bińkowski et al., 1801.01401, when the features are Inception's)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.networks.features import matrices


def kid(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Unbiased squared MMD of features [N, D] and [M, D] under ``k(u, v) = (u.v / D + 1)^3``, in float64.

    The mean over ``subsets`` pairs of random subsets of min(``size``, N, M) rows, drawn without replacement and
    determined by ``seed``. Zero on average for equal laws, so it may be negative. Raises ``UserError`` on NaN, infinite
    or mismatched features.
    """
    x, y = matrices(x, y)
    m = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:m]]

    return sum(_mmd(subset(x), subset(y)) for _ in range(subsets)) / subsets


def _mmd(x: Tensor, y: Tensor) -> float:
    """Of two sets of m rows; the diagonals, where a sample meets itself, are what would bias it."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (m * (m - 1)) - 2 * xy.mean())
