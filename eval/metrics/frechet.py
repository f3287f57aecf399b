"""The Fréchet distance between two sets of features, each described by its mean and covariance.

On Inception features it is the FID (Heusel et al., 1706.08500); on any other features it must carry another name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import finite, matrices


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


@dataclass(frozen=True, eq=False)
class Moments:
    """What has been seen of a stream of features, in memory that does not grow: ``count``, ``mean`` [D] and the sum of
    products of deviations [D, D], float64. ``a + b`` is that of both (Chan et al., 1979), so parts of a set, in batches
    or processes, can be merged in any order."""

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of a batch [B, D], B >= 1. Raises ``UserError`` on NaN or infinite features."""
        x = finite(features)
        mean = x.mean(dim=0)
        centred = (x - mean).numpy()  # whose BLAS call knows that the product is symmetric: half the work of torch's
        return cls(len(x), mean, torch.from_numpy(centred.T @ centred))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.products + other.products + between)

    @property
    def statistics(self) -> Statistics:
        """Raises ``UserError`` on fewer than two samples."""
        if self.count < 2:
            raise UserError(f"A covariance needs two samples or more, got {self.count}.")
        return Statistics(self.mean, self.products / (self.count - 1), self.count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})``, >= 0; about ``2D/n + D(D+1)/(2n)`` too large for two
    sets of n samples of one law with unit covariance, so only values at one n compare.

    The trace of the root is the sum of the roots of the eigenvalues of ``L^T S_b L`` with ``S_a = L L^T``: symmetric,
    so real and stable. L is Cholesky's or, where S_a is singular, the root of its eigenvalues. Raises ``UserError``
    when the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"Statistics of {len(a.mean)} and of {len(b.mean)} features: they are not comparable.")
    factor, failed = torch.linalg.cholesky_ex(a.covariance)
    if failed:
        values, vectors = torch.linalg.eigh(a.covariance)
        factor = vectors * values.clamp(min=0).sqrt()
    product = factor.T @ b.covariance @ factor
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    distance = (a.mean - b.mean).square().sum() + spread
    return float(distance.clamp(min=0))  # equal singular covariances leave rounding (about 1e-6) of either sign


def bias(a: Statistics, b: Statistics) -> float:
    """About how much too large ``frechet_distance`` is because both sets are finite, for a Gaussian law: with l the
    eigenvalues of its covariance S (that of the larger set),

        (1/n + 1/m) (tr S + 1/2 sum_ij (1 + [i = j]) l_i l_j / (l_i + l_j))

    which is 2D/n + D(D+1)/(2n) for S = I and n = m. A set whose ``count`` is not known (0) counts as infinite.
    """
    larger = a if a.count > b.count else b
    l = torch.linalg.eigvalsh(larger.covariance).clamp(min=0)  # noqa: E741
    sums = l[:, None] + l
    pairs = torch.where(sums > 0, l[:, None] * l / sums, 0.0).sum() + l.sum() / 2
    return float(sum(1 / s.count for s in (a, b) if s.count) * (l.sum() + pairs / 2))


def bias_note(name: str, value: float, count: int, reference: Statistics) -> str | None:
    """A sentence where more than a twentieth of a distance is the bias of having ``count`` images alone."""
    large = bias(Statistics(reference.mean, reference.covariance, count), replace(reference, count=0))
    if large <= 0.05 * value:
        return None
    return (
        f"{name} {value:.3f}: of this about {large:.3f} is what {count:,} images of the reference's own law would have."
    )


def frechet_infinity(
    features: Tensor, reference: Statistics, points: int = 15, least: int = 5000, seed: int = 0
) -> float:
    """The distance that infinitely many samples would have (Chong & Forsyth, 1911.07023): distances of the first n
    features, shuffled, for ``points`` numbers n from ``least`` (at most half of all) to all, are a line in 1/n, whose
    value at 0 this is. The bias of the reference stays."""
    x = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))]
    counts = torch.linspace(min(least, len(x) // 2), len(x), points).round().long().tolist()
    values = [frechet_distance(Statistics.of(x[:n]), reference) for n in counts]
    line = torch.stack([torch.ones(points), 1 / torch.tensor(counts)], 1).double()
    return float(torch.linalg.lstsq(line, torch.tensor(values, dtype=torch.float64)[:, None]).solution[0, 0])
