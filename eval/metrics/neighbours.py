"""Distances to nearest neighbours, computed in blocks of rows: for precision, recall, density and coverage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import as_matrices

ROUNDING = 1e-13  # of the squared sizes: what float64 leaves of the distance between equal points
BLOCK_ROWS = 1000  # 1000 x 10,000 float64 distances are 80 MB


def centred(real: Tensor, generated: Tensor, k: int) -> list[Tensor]:
    """Both sets in float64, shifted by the mean of the real one, because distances computed by a matrix product lose
    digits to a common offset. Raises ``UserError`` if a set has k points or fewer."""
    real, generated = as_matrices(real, generated)
    if not 0 < k < min(len(real), len(generated)):
        raise UserError(
            f"k = {k} neighbours need more than k points in both sets, got {len(real)} and {len(generated)}."
        )
    centre = real.mean(dim=0)
    return [real - centre, generated - centre]


def squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Between all rows of x and y, ``BLOCK_ROWS`` rows of x at a time; exactly 0 between equal rows, so that balls of
    radius 0, around repeated points, contain their copies."""
    for rows in x.split(BLOCK_ROWS):
        sizes = rows.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
        distances = sizes - 2 * rows @ y.T
        yield torch.where(distances > ROUNDING * sizes, distances, 0.0)


def squared_radius(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row: the (k+1)-th smallest, as the first is the row."""
    return torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in squared_distances(x, x)])
