"""KID, the kernel distance of Inception features (Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_matrices

SUBSETS = 100
SUBSET_SIZE = 1000
ERROR_OF = f"standard deviation over {SUBSETS} subsets"


def kid(x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> float:
    """Unbiased squared MMD of features [N, D] and [M, D] under ``k(u, v) = (u.v / D + 1)^3``, in float64.

    The mean over ``subsets`` pairs of random subsets of min(``size``, N, M) rows, chosen without replacement by
    ``seed``. Its expectation is zero for equal distributions, so values may be negative. Raises ``UserError`` on
    NaN, infinite or mismatched features.
    """
    return float(subset_values(x, y, subsets, size, seed).mean())


def subset_values(x: Tensor, y: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> Tensor:
    """The values [``subsets``] whose mean is ``kid``. Their standard deviation, which papers report, is that of one
    subset, not of the mean."""
    x, y = as_matrices(x, y)
    m = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:m]]

    return torch.tensor([_mmd(subset(x), subset(y)) for _ in range(subsets)], dtype=torch.float64)


def kid_and_deviation(x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """The KID and the standard deviation over its subsets; None if each subset is all of both sets, so that their
    values are one."""
    values, whole = subset_values(x, y), len(x) == len(y) <= SUBSET_SIZE
    return float(values.mean()), None if whole else float(values.std())


def _mmd(x: Tensor, y: Tensor) -> float:
    """Of two sets of m rows, without the diagonals, which would bias it."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (m * (m - 1)) - 2 * xy.mean())


def _both(inputs: MetricInput) -> tuple[float, float | None]:
    return kid_and_deviation(*inputs.both)


KID = Metric(
    name="kid", network="inception", direction="lower", minimum_n=2, needs_features=True, needs_reference=True,
    needs_real_features=True,
    compute=lambda inputs: inputs.shared(_both)[0], error=lambda inputs: inputs.shared(_both)[1], error_of=ERROR_OF,
    computation=f"unbiased MMD with a cubic kernel, mean over {SUBSETS} subsets of up to 1,000",
)  # fmt: skip
