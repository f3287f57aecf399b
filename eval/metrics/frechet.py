"""The Fréchet distance between two sets of features, each described by its mean and covariance.

On Inception features it is the FID (Heusel et al., 1706.08500); on any other features it must carry another name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import as_finite, as_matrices

if TYPE_CHECKING:
    from fewstep.eval.metrics.metric import MetricInput


@dataclass(frozen=True, eq=False)
class Statistics:
    """``mean`` [D] and ``covariance`` [D, D] (divided by ``count`` - 1) of ``count`` samples, float64 on the host.

    Raises ``UserError`` if the shapes do not fit or a number is not finite.
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
            raise UserError("The mean or covariance of the features contains NaN or infinite numbers.")

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Statistics of features [N, D], N >= 2. Raises ``UserError`` on NaN or infinite features."""
        (x,) = as_matrices(features)
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(mean, centred.T @ centred / (len(x) - 1), len(x))


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of a stream of features in constant memory: ``count``, ``mean`` [D] and the sum of products of
    deviations [D, D], float64. ``a + b`` merges two parts of a set (Chan et al., 1979), in any order."""

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of a batch [B, D], B >= 1. Raises ``UserError`` on NaN or infinite features."""
        x = as_finite(features)
        mean = x.mean(dim=0)
        centred = (x - mean).numpy()  # numpy's BLAS call exploits the symmetry of the product, torch's does not
        return cls(len(x), mean, torch.from_numpy(centred.T @ centred))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        difference = other.mean - self.mean
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.products + other.products + between)

    @property
    def statistics(self) -> Statistics:
        """Raises ``UserError`` on fewer than two samples."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least two samples, got {self.count}.")
        return Statistics(self.mean, self.products / (self.count - 1), self.count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})``, >= 0; about ``2D/n + D(D+1)/(2n)`` too large for two
    sets of n samples of one law with unit covariance, so compare values only at equal n.

    The trace of the root is the sum of the roots of the eigenvalues of ``L^T S_b L`` with ``S_a = L L^T``: symmetric,
    so real and stable. L is the Cholesky factor or, where S_a is singular, comes from its eigenvalues. Raises
    ``UserError`` if the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"Statistics of {len(a.mean)} and of {len(b.mean)} features are not comparable.")
    factor, failed = torch.linalg.cholesky_ex(a.covariance)
    if failed:
        values, vectors = torch.linalg.eigh(a.covariance)
        factor = vectors * values.clamp(min=0).sqrt()
    product = factor.T @ b.covariance @ factor
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    distance = (a.mean - b.mean).square().sum() + spread
    return float(distance.clamp(min=0))  # rounding of equal singular covariances is about 1e-6, of either sign


def frechet_to_reference(inputs: MetricInput) -> float:
    """The ``compute`` of every metric that is a Fréchet distance to the reference."""
    return frechet_distance(inputs.images.statistics, inputs.real.statistics)


def bias(a: Statistics, b: Statistics) -> float:
    """By how much ``frechet_distance`` is too large, approximately, because both sets are finite, for a Gaussian law:
    with l the eigenvalues of its covariance S (that of the larger set),

        (1/n + 1/m) (tr S + 1/2 sum_ij (1 + [i = j]) l_i l_j / (l_i + l_j))

    which is 2D/n + D(D+1)/(2n) for S = I and n = m. A set of unknown ``count`` (0) counts as infinite.
    """
    larger = a if a.count > b.count else b
    l = torch.linalg.eigvalsh(larger.covariance).clamp(min=0)  # noqa: E741
    sums = l[:, None] + l
    pairs = torch.where(sums > 0, l[:, None] * l / sums, 0.0).sum() + l.sum() / 2
    return float(sum(1 / s.count for s in (a, b) if s.count) * (l.sum() + pairs / 2))


def bias_note(name: str, value: float, count: int, reference: Statistics) -> str | None:
    """A remark if more than a twentieth of a distance is the bias of having only ``count`` images."""
    large = bias(Statistics(reference.mean, reference.covariance, count), replace(reference, count=0))
    if large <= 0.05 * value:
        return None
    return (
        f"{name} {value:.3f}: {count:,} real images would score about {large:.3f} because of their small number alone."
    )
