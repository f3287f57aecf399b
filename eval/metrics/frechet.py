"""The Fréchet distance between two sets of features, each described by its mean and covariance.

On Inception features it is the FID (Heusel et al., 1706.08500); on any other features it must carry another name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.jackknife import MINIMUM_N, groups_of, jackknife_error, strata
from fewstep.eval.networks.features import as_finite, as_matrices

if TYPE_CHECKING:
    from fewstep.eval.metrics.metric import MetricInput

ROUNDING = 1e-3  # of the largest eigenvalue; covariances that were stored in single precision stay far below


@dataclass(frozen=True, eq=False)
class Statistics:
    """``mean`` [D] and ``covariance`` [D, D] (divided by ``count`` - 1) of ``count`` samples, float64 on the host.

    Raises ``UserError`` if the shapes do not fit, a number is not finite or a variance is negative.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if d == 0 or self.mean.shape != (d,) or self.covariance.shape != (d, d):
            shapes = f"{list(self.mean.shape)} and {list(self.covariance.shape)}"
            raise UserError(f"A mean [D] and a covariance [D, D] are needed, got {shapes}.")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise UserError("The mean or covariance of the features contains NaN or infinite numbers.")
        if (lowest := float(self.covariance.diagonal().min())) < 0:
            raise UserError(f"A covariance cannot have a variance below 0, got {lowest:.4g}.")

    def check_semidefinite(self, origin: str) -> None:
        """Raises ``UserError`` if the covariance, which comes from ``origin``, is not one: not symmetric, or with
        eigenvalues below zero by more than the rounding of single precision."""
        values = torch.linalg.eigvalsh(self.covariance)
        asymmetry = (self.covariance - self.covariance.T).abs().max()
        scale = self.covariance.abs().max()
        if asymmetry > ROUNDING * scale or values[0] < -ROUNDING * max(values[-1], 0):
            raise UserError(
                f"{origin}: sigma is not a covariance (eigenvalues from {values[0]:.4g} to {values[-1]:.4g}, asymmetry "
                f"{asymmetry:.4g}); compute the statistics again."
            )

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

    def __sub__(self, part: Moments) -> Moments:
        """The rest of a set without a smaller part of it."""
        count = self.count - part.count
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        difference = part.mean - mean
        between = torch.outer(difference, difference) * (count * part.count / self.count)
        rest = self.products - part.products - between
        rest.diagonal().clamp_(min=0)  # of a feature that is constant in the rest, rounding leaves about -1e-16
        return Moments(count, mean, rest)

    @property
    def statistics(self) -> Statistics:
        """Raises ``UserError`` on fewer than two samples."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least two samples, got {self.count}.")
        return Statistics(self.mean, self.products / (self.count - 1), self.count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})``, >= 0; about ``2D/n + D(D+1)/(2n)`` too large for two
    sets of n samples of one distribution with unit covariance, so compare values only at equal n.

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


def frechet_error_to_reference(inputs: MetricInput) -> float | None:
    """The error bar of every such metric; None if there are too few images."""
    return frechet_error(inputs.images.groups, inputs.real.statistics)


def grouped_moments(features: Tensor, conditions: int = 0) -> tuple[Moments, ...]:
    """The moments of each of the jackknife's groups of features [N, D]; fewer than ten groups if N is below 10. Row k
    belongs to class or caption ``k % conditions``; 0: unknown."""
    groups = groups_of(torch.arange(len(features)), strata(len(features), conditions))
    return tuple(Moments.of(features[groups == group]) for group in groups.unique())


def frechet_error(groups: Sequence[Moments], reference: Statistics) -> float | None:
    """The standard error of the Fréchet distance of a set from a fixed reference, by the jackknife over its groups;
    None if there are none, or if they are too small."""
    if not groups or sum(group.count for group in groups) < MINIMUM_N:
        return None
    total = sum(groups[1:], groups[0])
    return jackknife_error([frechet_distance((total - group).statistics, reference) for group in groups])


@lru_cache(maxsize=16)
def small_sample_bias(reference: Statistics, n: int) -> float:
    """The Fréchet distance that ``n`` samples of the reference's own distribution have from it, on average, if it is
    Gaussian.

    With l the eigenvalues of its covariance, it is ``sum l / n`` from the mean, plus what the covariance of n samples
    adds. The first order of the latter, ``sum_ij (1 + [i = j]) l_i l_j / (l_i + l_j) / (2n)``, is right only for n far
    above D (for fewer samples it exceeds even the bound ``2 sum l``), so the covariance is simulated instead, which is
    right for every n >= 2: its scatter matrix is Wishart with n - 1 degrees of freedom, by Bartlett's decomposition
    where n - 1 >= D. The seed is fixed; the result is within about a percent of the mean.
    """
    l = torch.linalg.eigvalsh(reference.covariance).clamp(min=0).numpy()  # noqa: E741
    d, freedom = len(l), n - 1
    random = np.random.default_rng(0)
    repeats = max(1, 2048 // d)
    biases = []
    for _ in range(repeats):
        if freedom < d:
            factor = random.standard_normal((freedom, d))
        else:
            factor = np.triu(random.standard_normal((d, d)), 1)
            np.fill_diagonal(factor, np.sqrt(random.chisquare(freedom - np.arange(d))))
        trace = (np.square(factor).sum(0) * l).sum() / freedom
        scaled = torch.from_numpy(factor * l)  # in coordinates in which the covariance is diagonal
        gram = (scaled @ scaled.T if freedom < d else scaled.T @ scaled) / freedom
        biases.append(trace + l.sum() - 2 * float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()))
    return float(np.mean(biases) + l.sum() / n)
