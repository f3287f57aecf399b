"""Heun's method on the probability-flow ODE (Karras et al., arXiv 2206.00364); second order."""

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
    """In time: each step averages the slopes at both ends; the last step, to 0, is Euler's. 2N - 1 evaluations."""
    for t, t_next in pairwise(times):
        slope = predict(x, t).velocity
        guess = x + (t_next - t) * slope
        x = guess if t_next == 0 else x + (t_next - t) * 0.5 * (slope + predict(guess, t_next).velocity)
    return x


@dataclass(frozen=True)
class Churn:
    """Noise added before every step whose sigma / alpha lies within [``low``, ``high``] (S_churn, S_tmin, S_tmax and
    S_noise of the paper): ``amount`` over all steps, at most sqrt(2) - 1 of it per step, times ``scale``."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0


def heun_edm(
    predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None = None, *, churn: Churn | None = None
) -> Tensor:
    """The paper's Algorithm 2: Heun in rho = sigma / alpha on y = x / alpha, whose slope is the predicted noise.

    Steps from alpha = 0 (rho infinite) or to rho = 0 are of first order. 2N - 1 evaluations, one fewer from alpha = 0.
    """
    grid = predict.nodes(times)
    churn = churn or Churn()
    for s, t in pairwise(grid):
        if s.alpha and churn.low <= s.sigma / s.alpha <= churn.high and churn.amount and noise is not None:
            x, s = _add_churn(predict, x, s, churn, len(grid) - 1, noise)
        p = predict(x, s.t)
        guess = t.alpha * p.x0 + t.sigma * p.noise
        if t.sigma == 0 or s.alpha == 0:
            x = guess
            continue
        slope = 0.5 * (p.noise + predict(guess, t.t).noise)
        x = t.alpha * (x / s.alpha + (t.sigma / t.alpha - s.sigma / s.alpha) * slope)
    return x


def _add_churn(predict: Predictor, x: Tensor, s: Node, churn: Churn, steps: int, noise: Noise) -> tuple[Tensor, Node]:
    """The state with fresh noise added up to a higher noise level, and the node of that level."""
    rho = s.sigma / s.alpha
    higher = rho * (1 + min(churn.amount / steps, math.sqrt(2) - 1))
    log_snr = torch.tensor([-math.log(higher)], dtype=torch.float64)
    t = predict.schedule.time_of_log_snr(log_snr).clamp(max=1.0).tolist()
    node = predict.nodes(t)[0]
    added = math.sqrt(max(0.0, (node.sigma / node.alpha) ** 2 - rho**2)) if node.alpha else 0.0
    if not added:
        return x, s
    return node.alpha * (x / s.alpha + added * churn.scale * noise()), node
