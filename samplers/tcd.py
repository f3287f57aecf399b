"""Strategic stochastic sampling (TCD, Zheng et al., arXiv 2402.19159): beyond the next time and back by noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.schedules import bridge
from fewstep.samplers.exponential import Noise
from fewstep.samplers.predictor import Predictor


def tcd(predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise, *, gamma: float = 0.3) -> Tensor:
    """For consistency students: DDIM to ``(1 - gamma) t``, then fresh noise up to the next time t. ``gamma`` in [0, 1]
    is the stochasticity (diffusers' ``eta``): 0 is DDIM, 1 renoises x0. N evaluations."""
    for now, t in pairwise(predict.nodes(times)):
        p = predict(x, now.t)
        s = predict.nodes([(1 - gamma) * t.t])[0]
        x = s.alpha * p.x0 + s.sigma * p.noise
        if s.t < t.t:
            scale, std = bridge(predict.schedule, *torch.tensor([s.t, t.t], dtype=torch.float64))
            x = scale.item() * x + std.item() * noise()
    return x
