"""Euler's rule on the probability-flow ODE in time; first order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from fewstep.samplers.predictor import Predictor


def euler(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
    """``x += (t' - t) velocity`` from ``times[0]`` to ``times[-1]``; on a rectified flow the same map as DDIM."""
    for t, after in pairwise(times):
        x = x + (after - t) * predict(x, t).velocity
    return x
