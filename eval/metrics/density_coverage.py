"""Density and coverage (Naeem et al., arXiv 2002.09797): precision and recall that are robust to outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.metrics import neighbours
from fewstep.eval.metrics.metric import Metric, MetricInput

NEIGHBOURS = 5


def density_coverage(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(density, coverage) of features [N, D] and [M, D]; errors as in ``precision_recall``.

    Around each real point lies a ball whose radius is the distance to the k-th nearest real neighbour. Density is the
    mean number of balls that contain a generated point, divided by k: about 1 for equal distributions. Coverage is the
    share of balls that contain a generated point.
    """
    real, generated = neighbours.centred(real, generated, k)
    radius = neighbours.squared_radius(real, k)
    inside = 0
    covered = torch.zeros(len(real), dtype=torch.bool)
    for distances in neighbours.squared_distances(generated, real):
        contained = distances < radius
        inside += int(contained.sum())
        covered |= contained.any(dim=0)
    return inside / (k * len(generated)), int(covered.sum()) / len(real)


def _both(inputs: MetricInput) -> tuple[float, float]:
    return density_coverage(*inputs.both)


DENSITY = Metric(
    name="density", network="inception", direction="higher", minimum_n=NEIGHBOURS + 1,
    compute=lambda inputs: inputs.shared(_both)[0], needs_features=True, needs_reference=True,
    needs_real_features=True,
    computation=f"mean number of balls to the {NEIGHBOURS}th neighbour of real images around an image, / {NEIGHBOURS}",
)  # fmt: skip
COVERAGE = Metric(
    name="coverage", network="inception", direction="higher", minimum_n=NEIGHBOURS + 1,
    compute=lambda inputs: inputs.shared(_both)[1], needs_features=True, needs_reference=True,
    needs_real_features=True,
    computation=f"share of balls to the {NEIGHBOURS}th neighbour of real images that contain an image",
)  # fmt: skip
