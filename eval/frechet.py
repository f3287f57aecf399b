"""The Fréchet distance between two sets of features, each described by its mean and covariance.

On Inception features it is the FID (Heusel et al., 1706.08500); on any other features it must carry another name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.eval.features import matrices


@dataclass(frozen=True, eq=False)
class Statistics:
    """``mean`` [D] and ``covariance`` [D, D] (divided by ``count`` - 1) of ``count`` samples, float64 on the host.

    Raises ``UserError`` when the shapes do not fit or a number is not finite.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            shapes = f"{list(self.mean.shape)} and {list(self.covariance.shape)}"
            raise UserError(f"A mean [D] and a covariance [D, D] are needed, got {shapes}.")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise UserError("The mean or covariance of the features holds NaN or infinite numbers.")

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Statistics of features [N, D], N >= 2. Raises ``UserError`` on NaN or infinite features."""
        (x,) = matrices(features)
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})``, >= 0; about ``2D/n + D(D+1)/(2n)`` too large for two
    sets of n samples of one law with unit covariance, so only values at one n compare.

    The trace of the root is the sum of the roots of the eigenvalues of ``R S_b R``, ``R = S_a^{1/2}``: symmetric, so
    real and stable for singular covariances, too. Raises ``UserError`` when the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"Statistics of {len(a.mean)} and of {len(b.mean)} features: they are not comparable.")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ b.covariance @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    distance = (a.mean - b.mean).square().sum() + spread
    return float(distance.clamp(min=0))  # equal singular covariances leave rounding (about 1e-6) of either sign
