"""DDIM (Song et al., arXiv 2010.02502): keep the predicted x0 and noise, change their coefficients; first order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers.predictor import Predictor


def ddim(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
    """``x_{t'} = alpha(t') x0 + sigma(t') noise``: deterministic (eta = 0), for any schedule."""
    for t, after in pairwise(times):
        p = predict(x, t)
        time = torch.tensor(after, dtype=torch.float64)
        alpha, sigma = float(predict.schedule.alpha(time)), float(predict.schedule.sigma(time))
        x = alpha * p.x0 + sigma * p.noise if sigma else alpha * p.x0
    return x
