"""The Vendi score (Friedman & Dieng, arXiv 2210.02410): the effective number of different images."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.jackknife import ERROR_OF, GROUPS, MINIMUM_N, groups_of, jackknife_error, strata
from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_matrices


def vendi_score(features: Tensor) -> float:
    """``exp(-sum_i l_i log l_i)``, with l the eigenvalues of K / N and K the cosines of features [N, D]; between 1 (all
    equal) and min(N, D) (all orthogonal).

    It grows with N until N is far above the number of different images: compare at equal N. Raises ``UserError`` on
    NaN, infinite or zero features.
    """
    unit = _unit_vectors(features)
    n, d = unit.shape
    return _effective_number(unit @ unit.T if n < d else unit.T @ unit)  # both have the same eigenvalues above 0


def vendi_error(features: Tensor, conditions: int = 0) -> float | None:
    """The standard error of the Vendi score by the jackknife; None if there are too few images. Row k belongs to class
    or caption ``k % conditions``; 0: unknown."""
    if len(features) < MINIMUM_N:
        return None
    unit = _unit_vectors(features)
    groups = groups_of(torch.arange(len(unit)), strata(len(unit), conditions))
    products = [part.T @ part for part in (unit[groups == group] for group in range(GROUPS))]
    total = torch.stack(products).sum(0)
    return jackknife_error([_effective_number(total - part) for part in products])


def _unit_vectors(features: Tensor) -> Tensor:
    (x,) = as_matrices(features)
    if empty := int((x == 0).all(dim=1).sum()):
        raise UserError(f"The features of {empty} of {len(x)} images are zero, so they have no cosine.")
    return F.normalize(x, dim=1)


def _effective_number(products: Tensor) -> float:
    """Of a matrix of products of unit vectors, whose trace is their number."""
    shares = torch.linalg.eigvalsh(products / products.trace()).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())


def mean_vendi_score(features: Tensor) -> float:
    """The mean over conditions of the Vendi score of each, of features [S, N, D]: S >= 2 seeds of N conditions."""
    return sum(map(vendi_score, features.unbind(1))) / features.shape[1]


def _compute(inputs: MetricInput) -> float:
    return vendi_score(inputs.images.features())


def _compute_per_condition(inputs: MetricInput) -> float:
    return mean_vendi_score(inputs.features_by_seed())


VENDI = Metric(
    name="vendi", network="inception", direction="higher", minimum_n=2, compute=_compute, needs_features=True,
    error=lambda inputs: vendi_error(inputs.images.features(), inputs.conditions), error_of=ERROR_OF,
    computation="effective number of different images: exp of the entropy of the eigenvalues of their cosines",
)  # fmt: skip
VENDI_DINOV2 = replace(VENDI, name="vendi_dinov2", network="dinov2")
VENDI_PER_CONDITION_DINOV2 = replace(
    VENDI_DINOV2, name="vendi_per_condition_dinov2", compute=_compute_per_condition, per_condition=True, error=None,
    error_of=None, computation="`vendi_dinov2` of the images of each class or caption, mean over these",
)  # fmt: skip
