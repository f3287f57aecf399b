"""Gradients through a sampler in memory of one step: the discrete adjoint (AdjointDPM, arXiv 2307.10711).

The states of a run are kept, its graphs are not; going backwards, each step is made again with a graph, and the
gradient is pulled through it. The result is the exact gradient of the discrete sampler, whatever its step. For example,
noise that leads to a wanted picture:

    for _ in range(50):
        x = x - 0.1 * through(predict, x, times, lambda x0: (x0 - wanted).square().mean()).x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.samplers.exponential import HistoryEntry, advance
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor

StepFunction = Callable[[Tensor, Node, Node], Tensor]


class Gradients(NamedTuple):
    """The loss, its gradient by the first state, and by each of the parameters (zeros where it does not depend)."""

    loss: Tensor
    x: Tensor
    parameters: list[Tensor]


def through(
    predict: Predictor, x: Tensor, times: Sequence[float], loss: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor] = (), step: StepFunction | None = None,
) -> Gradients:  # fmt: skip
    """Of ``loss(x_0)`` for the sampler that makes every step by ``step(x, s, t)`` (by default DDIM's); each step is a
    function of the state alone. Memory: N states and one step's graph; two forward passes a step."""
    step = step or ddim_step(predict)
    grid = predict.nodes(times)
    states = [x.detach()]
    with torch.no_grad():
        for s, t in pairwise(grid):
            states.append(step(states[-1], s, t))
    with torch.enable_grad():
        last = states.pop().requires_grad_()
        value = loss(last)
        (adjoint,) = torch.autograd.grad(value, last)
    totals = [torch.zeros_like(p) for p in parameters]
    for s, t in zip(grid[-2::-1], grid[:0:-1], strict=True):
        with torch.enable_grad():
            state = states.pop().requires_grad_()
            out = step(state, s, t)
            adjoint, *found = torch.autograd.grad(
                out, [state, *parameters], adjoint, allow_unused=True, materialize_grads=True
            )
        for total, grad in zip(totals, found, strict=True):
            total += grad
    return Gradients(value.detach(), adjoint, totals)


def ddim_step(predict: Predictor) -> StepFunction:
    """One step of first order."""
    return lambda x, s, t: advance(x, s, t, [HistoryEntry(s, predict(x, s.t))])


def midpoint_step(predict: Predictor) -> StepFunction:
    """One step of DPM-Solver++ 2S, which is a function of the state alone, too."""
    from fewstep.samplers.dpm_solver_pp import singlestep_pp

    return lambda x, s, t: singlestep_pp(predict, x, (s.t, t.t))
