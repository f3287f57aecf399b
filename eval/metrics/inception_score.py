"""The Inception Score (Salimans et al., arXiv 1606.03498): confident predictions that cover all classes."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_finite

SPLITS = 10


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> float:
    """``exp E KL(p(y|x) | p(y))`` of class probabilities [N, K], between 1 and K: the mean over ``splits`` consecutive
    parts. Raises ``UserError`` on fewer rows than splits and on rows that are not probabilities."""
    p = as_finite(probabilities)
    if len(p) < splits or (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-3).any():
        raise UserError(f"The Inception Score needs {splits} or more rows of probabilities, got {list(p.shape)}.")
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        marginal = part.mean(0, keepdim=True)
        divergence = (part * ((part + 1e-30).log() - (marginal + 1e-30).log())).sum(1)
        scores.append(float(divergence.mean().exp()))
    return sum(scores) / splits


def _compute(inputs: MetricInput) -> float:
    return inception_score(inputs.images.features())


INCEPTION_SCORE = Metric(
    name="inception_score", network="inception_classes", direction="higher", minimum_n=SPLITS, compute=_compute,
    needs_features=True,
)  # fmt: skip
