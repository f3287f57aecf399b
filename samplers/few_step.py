"""How a distilled student is sampled: on its own times, re-noising in between or deterministically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers.predictor import Predictor


def renoise(predict: Predictor, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Tensor:
    """Predict x0, noise it to the next time with fresh ``noise()``, and so on; the last x0 is the sample.

    The multistep sampler of consistency models (Song et al., arXiv 2303.01469, Algorithm 1) and of DMD2. A student
    trained for it must be read at exactly the times it was trained at. (The deterministic rule is ``ddim``.)
    """
    for t, after in pairwise(times):
        x = predict(x, t).x0
        if after > 0:
            time = torch.tensor(after, dtype=torch.float64)
            x = float(predict.schedule.alpha(time)) * x + float(predict.schedule.sigma(time)) * noise()
    return x
