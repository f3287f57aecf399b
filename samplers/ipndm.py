"""iPNDM and gradient estimation: DDIM with a fixed combination of the newest noise predictions.

iPNDM (Zhang & Chen, arXiv 2204.13902, after PNDM, arXiv 2202.09778) takes the Adams-Bashforth weights of equal steps,
gradient estimation (Permenter & Yuan, arXiv 2306.04848) those of its equation for gamma.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from fewstep.samplers.predictor import Predictor

Weights = Sequence[Sequence[float]]  # of one, two, ... predictions, the newest first
ADAMS_BASHFORTH: Weights = (
    (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)  # fmt: skip


def ipndm(predict: Predictor, x: Tensor, times: Sequence[float], *, order: int = 4) -> Tensor:
    """Adams-Bashforth up to ``order`` in sigma / alpha. The weights are those of equal steps, so that on a grid that is
    not uniform in sigma / alpha, every order above 1 converges with order 2. N evaluations."""
    return combine_noise(predict, x, times, ADAMS_BASHFORTH[:order])


def gradient_estimation(predict: Predictor, x: Tensor, times: Sequence[float], *, gamma: float = 2.0) -> Tensor:
    """``gamma e_i + (1 - gamma) e_(i - 1)``: 1 is DDIM, 3/2 iPNDM of order 2. Order 1 otherwise. N evaluations."""
    return combine_noise(predict, x, times, ((1,), (gamma, 1 - gamma)))


def combine_noise(predict: Predictor, x: Tensor, times: Sequence[float], weights: Weights) -> Tensor:
    """``y += (rho_t - rho_s) sum_j w_j e_j`` for y = x / alpha and rho = sigma / alpha, with the row of ``weights`` for
    the number of predictions that exist. The first step and the one to sigma = 0 are DDIM's."""
    past: list[Tensor] = []  # newest first
    for s, t in pairwise(predict.nodes(times)):
        p = predict(x, s.t)
        past = [p.noise, *past[: len(weights) - 1]]
        if len(past) == 1 or t.sigma == 0:
            x = t.alpha * p.x0 + t.sigma * p.noise
            continue
        ratio = t.alpha / s.alpha
        x = ratio * x
        for weight, noise in zip(weights[len(past) - 1], past, strict=True):
            x.add_(noise, alpha=weight * (t.sigma - ratio * s.sigma))
    return x
