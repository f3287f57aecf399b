"""Heun's rule on the probability-flow ODE in time (Karras et al., arXiv 2206.00364, Algorithm 1); second order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from fewstep.samplers.predictor import Predictor


def heun(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler to the next time, then the mean of both slopes; the last step, to 0, is Euler. N steps, 2N - 1 reads."""
    for t, after in pairwise(times):
        slope = predict(x, t).velocity
        guess = x + (after - t) * slope
        x = guess if after == 0 else x + (after - t) * 0.5 * (slope + predict(guess, after).velocity)
    return x
