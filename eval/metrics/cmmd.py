"""CMMD (Jayasumana et al., arXiv 2401.09603): the maximum mean discrepancy of CLIP embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_matrices

BLOCK_ROWS = 1000
WIDTH = 10.0


def cmmd(x: Tensor, y: Tensor) -> float:
    """1000 times the squared MMD of unit vectors [N, D] and [M, D] under ``exp(-|u - v|^2 / (2 10^2))``, with the
    diagonals as in the paper's code, so never below 0. Raises ``UserError`` on NaN, infinite or mismatched features."""
    x, y = as_matrices(x, y)
    return 1000 * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    """The mean of the kernel over all pairs of rows, in blocks that fit into memory."""
    blocks = (torch.exp(-torch.cdist(part, y).square() / (2 * WIDTH**2)) for part in x.split(BLOCK_ROWS))
    return sum(float(block.sum()) for block in blocks) / (len(x) * len(y))


def _compute(inputs: MetricInput) -> float:
    return cmmd(*inputs.both)


CMMD = Metric(
    name="cmmd", network="cmmd", direction="lower", minimum_n=2, compute=_compute, needs_features=True,
    needs_reference=True,
)  # fmt: skip
