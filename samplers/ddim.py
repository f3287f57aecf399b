"""DDIM (Song et al., arXiv 2010.02502): keep the predicted x0 and noise, change their coefficients; first order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from fewstep.samplers.exponential import Noise
from fewstep.samplers.predictor import Predictor


def ddim(
    predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None = None, *, eta: float = 0.0
) -> Tensor:
    """``x_t = alpha_t x0 + sqrt(sigma_t^2 - d^2) e + d z`` on any schedule, where ``d`` is ``eta`` times the standard
    deviation of the forward process's posterior: 0 is deterministic, 1 ancestral (DDPM). N evaluations."""
    for s, t in pairwise(predict.nodes(times)):
        p = predict(x, s.t)
        if not t.sigma:
            x = t.alpha * p.x0
            continue
        d = eta * t.sigma / s.sigma * math.sqrt(max(0.0, s.sigma**2 - (s.alpha * t.sigma / t.alpha) ** 2))
        x = t.alpha * p.x0 + math.sqrt(t.sigma**2 - d**2) * p.noise
        if d and noise is not None:
            x = x + d * noise()
    return x
