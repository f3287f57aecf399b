"""The Inception Score (Salimans et al., arXiv 1606.03498): confident predictions that cover all classes."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.features import as_finite

SPLITS = 10


def inception_score(probabilities: Tensor, splits: int = SPLITS, seed: int = 0) -> float:
    """``exp E KL(p(y|x) | p(y))`` of class probabilities [N, K], between 1 and K: the mean over ``splits`` parts.

    The rows are shuffled by ``seed``, because images that are ordered by class would have parts of few classes. Raises
    ``UserError`` on fewer rows than splits and on rows that are not probabilities.
    """
    return float(split_scores(probabilities, splits, seed).mean())


def split_scores(probabilities: Tensor, splits: int = SPLITS, seed: int = 0) -> Tensor:
    """The scores [``splits``] whose mean is ``inception_score``."""
    p = as_finite(probabilities)
    if len(p) < splits or (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-3).any():
        raise UserError(f"The Inception Score needs {splits} or more rows of probabilities, got {list(p.shape)}.")
    p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))]
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        marginal = part.mean(0)
        divergence = (part * ((part + 1e-30).log() - (marginal + 1e-30).log())).sum(1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores)


def _scores(inputs: MetricInput) -> Tensor:
    return split_scores(inputs.images.features())


INCEPTION_SCORE = Metric(
    name="inception_score", network="inception_classes", direction="higher", minimum_n=SPLITS, needs_features=True,
    compute=lambda inputs: float(inputs.shared(_scores).mean()),
    error=lambda inputs: float(inputs.shared(_scores).std(correction=0)),
    error_of=f"standard deviation over {SPLITS} splits, shuffled by a fixed seed",
    computation=f"exp of the mean divergence of an image's class probabilities from their mean, {SPLITS} splits",
)  # fmt: skip
