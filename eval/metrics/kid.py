"""KID, the kernel distance of Inception features (Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_matrices

SUBSETS = 100


def kid(x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = 1000, seed: int = 0) -> float:
    """Unbiased squared MMD of features [N, D] and [M, D] under ``k(u, v) = (u.v / D + 1)^3``, in float64.

    The mean over ``subsets`` pairs of random subsets of min(``size``, N, M) rows, chosen without replacement by
    ``seed``. Its expectation is zero for equal distributions, so values may be negative. Raises ``UserError`` on
    NaN, infinite or mismatched features.
    """
    return float(subset_values(x, y, subsets, size, seed).mean())


def subset_values(x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = 1000, seed: int = 0) -> Tensor:
    """The values [``subsets``] whose mean is ``kid``. Their standard deviation, which papers report, is that of one
    subset, not of the mean."""
    x, y = as_matrices(x, y)
    m = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:m]]

    return torch.tensor([_mmd(subset(x), subset(y)) for _ in range(subsets)], dtype=torch.float64)


def _mmd(x: Tensor, y: Tensor) -> float:
    """Of two sets of m rows, without the diagonals, which would bias it."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (m * (m - 1)) - 2 * xy.mean())


def _values(inputs: MetricInput) -> Tensor:
    return subset_values(*inputs.both)


KID = Metric(
    name="kid", network="inception", direction="lower", minimum_n=2, needs_features=True, needs_reference=True,
    needs_real_features=True,
    compute=lambda inputs: float(inputs.shared(_values).mean()),
    error=lambda inputs: float(inputs.shared(_values).std()), error_of=f"standard deviation over {SUBSETS} subsets",
    computation=f"unbiased MMD with a cubic kernel, mean over {SUBSETS} subsets of up to 1,000",
)  # fmt: skip
