"""The Inception Score (Salimans et al., arXiv 1606.03498): confident classes, and all of them."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import finite


def inception_score(probabilities: Tensor, splits: int = 10) -> float:
    """``exp E KL(p(y|x) | p(y))`` of class probabilities [N, K], the mean over consecutive ``splits``: between 1 and K.
    Raises ``UserError`` on fewer rows than splits and on rows that are no probabilities."""
    p = finite(probabilities)
    if len(p) < splits or (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-3).any():
        raise UserError(f"The Inception Score needs {splits} or more rows of probabilities, got {list(p.shape)}.")
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        marginal = part.mean(0, keepdim=True)
        divergence = (part * ((part + 1e-30).log() - (marginal + 1e-30).log())).sum(1)
        scores.append(float(divergence.mean().exp()))
    return sum(scores) / splits
