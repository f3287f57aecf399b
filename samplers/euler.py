"""The Euler method on the probability-flow ODE in time; first order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from fewstep.samplers.predictor import Predictor


def euler(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
    """``x += (t_next - t) velocity`` from ``times[0]`` to ``times[-1]``; equals DDIM on a rectified flow."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * predict(x, t).velocity
    return x
