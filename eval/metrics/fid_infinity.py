"""FID-infinity: the FID that infinitely many samples would have (Chong & Forsyth, arXiv 1911.07023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.metrics.metric import Metric, MetricInput


def frechet_infinity(
    features: Tensor, reference: Statistics, points: int = 15, smallest: int = 5000, seed: int = 0
) -> tuple[float, float]:
    """The Fréchet distance of features [N, D], extrapolated to infinitely many, and its standard error in the fit.

    The features are shuffled by ``seed``. A line in 1/n is fitted to the distances of the first n of them, for
    ``points`` values of n from ``smallest`` (at most N / 2) to N, and its value at 1/n = 0 is returned. The reference's
    bias remains. The subsets are nested, so that the standard error, which takes them as independent, is too small.
    """
    x = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))]
    counts = torch.linspace(min(smallest, len(x) // 2), len(x), points).round().long().tolist()
    values = torch.tensor([frechet_distance(Statistics.of(x[:n]), reference) for n in counts], dtype=torch.float64)
    line = torch.stack([torch.ones(points), 1 / torch.tensor(counts)], 1).double()
    solution = torch.linalg.lstsq(line, values[:, None]).solution[:, 0]
    variance = (values - line @ solution).square().sum() / (points - 2)
    return float(solution[0]), float((variance * torch.linalg.inv(line.T @ line)[0, 0]).sqrt())


def _fit(inputs: MetricInput) -> tuple[float, float]:
    return frechet_infinity(inputs.images.features(), inputs.real.statistics)


FID_INFINITY = Metric(
    name="fid_infinity", network="inception", direction="lower", minimum_n=4, needs_features=True, needs_reference=True,
    compute=lambda inputs: inputs.shared(_fit)[0], error=lambda inputs: inputs.shared(_fit)[1],
    error_of="standard error of the fit", computation="`fid` extrapolated to infinitely many images, linear in 1/n",
)  # fmt: skip
