"""Sampling of a distilled student that renoises its prediction between steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers.exponential import Noise
from fewstep.samplers.predictor import Predictor


def renoise(predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Predicts x0, adds fresh ``noise()`` up to the next time, and repeats; the last x0 is the sample.

    The multistep sampler of consistency models (Song et al., arXiv 2303.01469, Algorithm 1) and of DMD2. A student
    trained for it must be evaluated at exactly the times of its training. (The deterministic rule is ``ddim``.)
    """
    for t, t_next in pairwise(times):
        x = predict(x, t).x0
        if t_next > 0:
            time = torch.tensor(t_next, dtype=torch.float64)
            x = float(predict.schedule.alpha(time)) * x + float(predict.schedule.sigma(time)) * noise()
    return x
