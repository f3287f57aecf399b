"""CMMD (Jayasumana et al., arXiv 2401.09603): the maximum mean discrepancy of CLIP embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.networks.features import matrices

ROWS = 1000
WIDTH = 10.0


def cmmd(x: Tensor, y: Tensor) -> float:
    """1000 times the squared MMD of unit rows [N, D] and [M, D] under ``exp(-|u - v|^2 / (2 10^2))``, diagonals kept as
    in the paper's code, so never below 0. Raises ``UserError`` on NaN, infinite or mismatched features."""
    x, y = matrices(x, y)
    return 1000 * (_mean(x, x) + _mean(y, y) - 2 * _mean(x, y))


def _mean(x: Tensor, y: Tensor) -> float:
    """Of the kernel between all rows, in parts that fit into memory."""
    total = sum(float(torch.exp(-torch.cdist(part, y).square() / (2 * WIDTH**2)).sum()) for part in x.split(ROWS))
    return total / (len(x) * len(y))
