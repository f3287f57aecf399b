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
    return cmmd_and_error(x, y)[0]


def cmmd_and_error(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The CMMD of real features x [N, D] and features y [M, D], and its standard error over y to first order.

    The latter is that of the mean over y of ``2 (mean_j k(y, y_j) - mean_i k(y, x_i))``, by which a further image
    changes the value.
    """
    x, y = as_matrices(x, y)
    to_own, to_real = _mean_kernels(y, y), _mean_kernels(y, x)
    value = _mean_kernels(x, x).mean() + to_own.mean() - 2 * to_real.mean()
    error = 2 * (to_own - to_real).std() / len(y) ** 0.5
    return 1000 * float(value), 1000 * float(error)


def _mean_kernels(x: Tensor, y: Tensor) -> Tensor:
    """The mean of the kernel over y of each row of x [N], in blocks that fit into memory."""
    blocks = (torch.exp(-torch.cdist(part, y).square() / (2 * WIDTH**2)) for part in x.split(BLOCK_ROWS))
    return torch.cat([block.mean(1) for block in blocks])


def _both(inputs: MetricInput) -> tuple[float, float]:
    return cmmd_and_error(*inputs.both)


CMMD = Metric(
    name="cmmd", network="cmmd", direction="lower", minimum_n=2, needs_features=True, needs_reference=True,
    needs_real_features=True,
    compute=lambda inputs: inputs.shared(_both)[0], error=lambda inputs: inputs.shared(_both)[1],
    error_of="standard error over images, to first order", computation="MMD with a Gaussian kernel, times 1,000",
)  # fmt: skip
