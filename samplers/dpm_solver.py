"""DPM-Solver-1, -2, -3 (Lu et al., arXiv 2206.00927): singlestep exponential integrators on the predicted noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from fewstep.samplers.dpm_solver_pp import has_inner_node, inner_node
from fewstep.samplers.exponential import HistoryEntry, advance
from fewstep.samplers.predictor import Predictor


def dpm_solver(predict: Predictor, x: Tensor, times: Sequence[float], *, order: int = 2) -> Tensor:
    """``order`` evaluations per step, equally spaced in log-SNR. Steps from alpha = 0 and to sigma = 0, where the
    log-SNR is infinite, are of first order, where the form has no effect."""
    for s, t in pairwise(predict.nodes(times)):
        at_s = HistoryEntry(s, predict(x, s.t))
        if order == 1 or not has_inner_node(s, t):
            x = advance(x, s, t, [at_s])
        elif order == 2:
            middle = inner_node(predict, s, t, 1 / 2)
            at_middle = HistoryEntry(middle, predict(advance(x, s, middle, [at_s]), middle.t))
            x = advance(x, s, t, [at_s, at_middle], "noise", "midpoint")
        else:
            first, second = inner_node(predict, s, t, 1 / 3), inner_node(predict, s, t, 2 / 3)
            at_first = HistoryEntry(first, predict(advance(x, s, first, [at_s]), first.t))
            at_second = HistoryEntry(second, predict(advance(x, s, second, [at_s, at_first], "noise"), second.t))
            x = advance(x, s, t, [at_s, at_second], "noise")
    return x
