"""Precision and recall (Kynkäänniemi et al., arXiv 1904.06991): how real the images are, and how much they cover."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.eval.metrics import neighbours
from fewstep.eval.metrics.metric import Metric, MetricInput

NEIGHBOURS = 3
PRECISION_ERROR_OF = "half of Wilson's 68 % interval of a share of the images"


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) in 0..1 of features [N, D] and [M, D].

    The support of a set is the union of the balls around its points whose radius is the distance to the k-th nearest
    neighbour in the set. Precision is the share of generated points in the real support, recall the share of real
    points in the generated support. Both depend on N and M: compare at equal counts. Raises ``UserError`` if a set has
    k points or fewer, and on NaN, infinite or mismatched features.
    """
    real, generated = neighbours.centred(real, generated, k)
    real_radius, generated_radius = neighbours.squared_radius(real, k), neighbours.squared_radius(generated, k)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    blocks = zip(
        neighbours.squared_distances(generated, real), generated_radius.split(neighbours.BLOCK_ROWS), strict=True
    )
    for distances, radius in blocks:
        precise += int((distances <= real_radius).any(dim=1).sum())
        recalled |= (distances <= radius[:, None]).any(dim=0)
    return precise / len(generated), int(recalled.sum()) / len(real)


def _both(inputs: MetricInput) -> tuple[float, float]:
    return precision_recall(*inputs.both)


def precision_error(precision: float, n: int) -> float:
    """Half of Wilson's 68 % interval of a share of ``n`` independent images: nearly its standard error, but above 0 for
    a share of 0 or 1, of which a finite number of images is no proof."""
    return math.sqrt(precision * (1 - precision) / n + 1 / (4 * n * n)) / (1 + 1 / n)


PRECISION = Metric(
    name="precision", network="inception", direction="higher", minimum_n=NEIGHBOURS + 1,
    compute=lambda inputs: inputs.shared(_both)[0], needs_features=True, needs_reference=True,
    needs_real_features=True,
    error=lambda inputs: precision_error(inputs.shared(_both)[0], inputs.images.statistics.count),
    error_of=PRECISION_ERROR_OF,
    computation=f"share of images within balls to the {NEIGHBOURS}rd neighbour of real ones",
)  # fmt: skip
RECALL = Metric(
    name="recall", network="inception", direction="higher", minimum_n=NEIGHBOURS + 1,
    compute=lambda inputs: inputs.shared(_both)[1], needs_features=True, needs_reference=True,
    needs_real_features=True,
    computation=f"share of real images within balls to the {NEIGHBOURS}rd neighbour of images",
)  # fmt: skip
