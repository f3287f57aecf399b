"""Heun's rule on the probability-flow ODE (Karras et al., arXiv 2206.00364); second order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers.exponential import Noise
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor


def heun(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
    """In time: Euler to the next node, then the mean of both slopes; the last step, to 0, is Euler. 2N - 1 reads."""
    for t, after in pairwise(times):
        slope = predict(x, t).velocity
        guess = x + (after - t) * slope
        x = guess if after == 0 else x + (after - t) * 0.5 * (slope + predict(guess, after).velocity)
    return x


@dataclass(frozen=True)
class Churn:
    """Noise added before every step whose sigma / alpha lies within ``low`` .. ``high``: ``amount`` over all steps, at
    most sqrt(2) - 1 of it a step, times ``scale`` (S_churn, S_tmin, S_tmax, S_noise of the paper)."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0


def heun_edm(
    predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None = None, *, churn: Churn | None = None
) -> Tensor:
    """The paper's Algorithm 2: Heun in rho = sigma / alpha on y = x / alpha, whose slope is the predicted noise.

    A step from alpha = 0 (rho infinite) or to rho = 0 is of first order. 2N - 1 reads, one fewer from alpha = 0.
    """
    grid = predict.nodes(times)
    churn = churn or Churn()
    for s, t in pairwise(grid):
        if s.alpha and churn.low <= s.sigma / s.alpha <= churn.high and churn.amount and noise is not None:
            x, s = _churned(predict, x, s, churn, len(grid) - 1, noise)
        p = predict(x, s.t)
        guess = t.alpha * p.x0 + t.sigma * p.noise
        if t.sigma == 0 or s.alpha == 0:
            x = guess
            continue
        slope = 0.5 * (p.noise + predict(guess, t.t).noise)
        x = t.alpha * (x / s.alpha + (t.sigma / t.alpha - s.sigma / s.alpha) * slope)
    return x


def _churned(predict: Predictor, x: Tensor, s: Node, churn: Churn, steps: int, noise: Noise) -> tuple[Tensor, Node]:
    """The state at a higher noise level, with fresh noise for the difference, and that level's node."""
    rho = s.sigma / s.alpha
    higher = rho * (1 + min(churn.amount / steps, math.sqrt(2) - 1))
    log_snr = torch.tensor([-math.log(higher)], dtype=torch.float64)
    t = predict.schedule.time_of_log_snr(log_snr).clamp(max=1.0).tolist()
    node = predict.nodes(t)[0]
    more = math.sqrt(max(0.0, (node.sigma / node.alpha) ** 2 - rho**2)) if node.alpha else 0.0
    if not more:
        return x, s
    return node.alpha * (x / s.alpha + more * churn.scale * noise()), node
