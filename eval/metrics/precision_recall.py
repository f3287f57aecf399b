"""Is it real, and is all of the real there? Precision and recall (Kynkäänniemi et al., 1904.06991), density and
coverage (Naeem et al., 2002.09797)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import matrices

ROWS = 1000  # 1000 x 10,000 float64 distances are 80 MB


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall) in 0..1 of features [N, D] and [M, D].

    A set's support is the union of the balls around its points that reach to their k-th nearest neighbour in the set.
    Precision is the share of generated points in the real support, recall the share of real points in the generated
    support. Both depend on N and M: compare at equal counts. Raises ``UserError`` when a set has no more than k points
    and on NaN, infinite or mismatched features.
    """
    real, generated = _centred(real, generated, k)
    real_radius, generated_radius = _radius(real, k), _radius(generated, k)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for distances, radius in zip(_squared_distances(generated, real), generated_radius.split(ROWS), strict=True):
        precise += int((distances <= real_radius).any(dim=1).sum())
        recalled |= (distances <= radius[:, None]).any(dim=0)
    return precise / len(generated), int(recalled.sum()) / len(real)


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage) of features [N, D] and [M, D]; errors as of ``precision_recall``.

    Density is the mean number of real balls that a generated point lies in, over k: about 1 for equal laws, and robust
    to an outlier's large ball. Coverage is the share of real balls that hold a generated point.
    """
    real, generated = _centred(real, generated, k)
    radius = _radius(real, k)
    inside = 0
    covered = torch.zeros(len(real), dtype=torch.bool)
    for distances in _squared_distances(generated, real):
        held = distances < radius
        inside += int(held.sum())
        covered |= held.any(dim=0)
    return inside / (k * len(generated)), int(covered.sum()) / len(real)


def _centred(real: Tensor, generated: Tensor, k: int) -> list[Tensor]:
    real, generated = matrices(real, generated)
    if not 0 < k < min(len(real), len(generated)):
        raise UserError(f"k = {k} neighbours need more than k points in both sets, got {len(real)}, {len(generated)}.")
    centre = real.mean(dim=0)  # distances through a matrix product lose digits to a common offset
    return [real - centre, generated - centre]


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Between all rows of x and y, ``ROWS`` rows of x at a time."""
    for rows in x.split(ROWS):
        sizes = rows.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
        yield (sizes - 2 * rows @ y.T).clamp(min=0)


def _radius(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row: the (k+1)-th smallest, the first being itself."""
    return torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in _squared_distances(x, x)])
