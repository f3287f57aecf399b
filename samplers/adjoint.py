"""Gradients through a sampler with the memory of one step: the discrete adjoint (AdjointDPM, arXiv 2307.10711).

The forward pass keeps the states without their graphs. The backward pass recomputes each step with a graph and applies
the chain rule, which gives the exact gradient of the discrete sampler, whatever its step. For example, to find noise
that leads to a target image:

    for _ in range(50):
        x = x - 0.1 * sampler_gradients(predict, x, times, lambda x0: (x0 - target).square().mean()).x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.samplers.dpm_solver_pp import singlestep_pp
from fewstep.samplers.exponential import HistoryEntry, advance
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor

StepFunction = Callable[[Tensor, Node, Node], Tensor]


class Gradients(NamedTuple):
    """The loss and its gradients by the first state and by each parameter (zeros where the loss is independent)."""

    loss: Tensor
    x: Tensor
    parameters: list[Tensor]


def sampler_gradients(
    predict: Predictor, x: Tensor, times: Sequence[float], loss: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor] = (), step: StepFunction | None = None,
) -> Gradients:  # fmt: skip
    """The gradients of ``loss(x_0)`` for the sampler that takes every step by ``step(x, s, t)`` (DDIM by default), a
    function of the state alone. Needs the memory of N states and one step's graph, and two forward passes per step."""
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
    for t, s in pairwise(reversed(grid)):
        with torch.enable_grad():
            state = states.pop().requires_grad_()
            output = step(state, s, t)
            adjoint, *grads = torch.autograd.grad(output, [state, *parameters], adjoint, materialize_grads=True)
        for total, grad in zip(totals, grads, strict=True):
            total += grad
    return Gradients(value.detach(), adjoint, totals)


def ddim_step(predict: Predictor) -> StepFunction:
    """A DDIM step, of first order."""
    return lambda x, s, t: advance(x, s, t, [HistoryEntry(s, predict(x, s.t))])


def midpoint_step(predict: Predictor) -> StepFunction:
    """A DPM-Solver++ 2S step, of second order."""
    return lambda x, s, t: singlestep_pp(predict, x, (s.t, t.t))
