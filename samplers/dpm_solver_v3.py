"""DPM-Solver-v3 (Zheng et al., arXiv 2310.13268): exponential integration around a linear model of the network itself.

With e the predicted noise, element-wise statistics l, s, b of the network over log-SNR (``statistics.py``) and their
integrals L = int l, S = int s, B = int exp(-S) b, let

    f = (sigma e - l x) / alpha            g(u) = exp(S_s - S_u) f_u - exp(S_s) (B_u - B_s)
    E_k = int_s^t exp((L + S)_u - (L + S)_s) (u - lambda_s)^k / k! du      (k = 0, 1, ..)
    F   = int_s^t exp((L + S)_u - (L + S)_s) exp(S_s) (B_u - B_s) du

Then x_t = alpha_t exp(L_s - L_t) (x_s / alpha_s - F - sum_k E_k g^(k)(lambda_s)). Only g is approximated, and it is as
flat as the statistics can make it; its derivatives are estimated from differences between evaluated nodes.
(l, s, b) = (1, 0, 0) is DPM-Solver++ with Taylor weights, (0, -1, 0) the noise form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor


class IntervalIntegrals(NamedTuple):
    """The factor ``exp(L_s - L_t)``, the offset ``F`` and the coefficients ``E_0, E_1, ..`` of a step."""

    factor: Tensor
    offset: Tensor
    coefficients: list[Tensor]


@dataclass(frozen=True)
class Statistics:
    """``l``, ``s``, ``b`` [M + 1, ...] of a network at increasing log-SNRs [M + 1], float64 on the host."""

    log_snr: Tensor
    l: Tensor  # noqa: E741 - the paper's letter
    s: Tensor
    b: Tensor

    @staticmethod
    def read(file: Path) -> Statistics:
        """Raises ``UserError`` if the file is missing (``fewstep solver fit-v3`` creates it) or holds other tensors."""
        tensors = read_tensors(file) if file.is_file() else {}
        if set(tensors) != {"log_snr", "l", "s", "b"}:
            raise UserError(f"DPM-Solver-v3 needs the model's statistics in {file}: run fewstep solver fit-v3.")
        return Statistics(*(tensors[name].double() for name in ("log_snr", "l", "s", "b")))

    def index(self, log_snr: float) -> int:
        """The index of the nearest log-SNR."""
        return int((self.log_snr - log_snr).abs().argmin())

    @cached_property
    def L(self) -> Tensor:
        return _integral(self.l, self._u)

    @cached_property
    def S(self) -> Tensor:
        return _integral(self.s, self._u)

    @cached_property
    def B(self) -> Tensor:
        return _integral(torch.exp(-self.S) * self.b, self._u)

    @cached_property
    def _u(self) -> Tensor:
        return self.log_snr.reshape(-1, *[1] * (self.l.ndim - 1))

    @cached_property
    def _intervals(self) -> dict[tuple[int, int, int, torch.device, torch.dtype], IntervalIntegrals]:
        return {}

    def integrals(self, s: int, t: int, count: int, like: Tensor) -> IntervalIntegrals:
        """The integrals from index s to t by the trapezoidal rule, with ``count`` coefficients; cached."""
        key = s, t, count, like.device, like.dtype
        if key not in self._intervals:
            part = slice(s, t + 1)
            growth = torch.exp((self.L + self.S)[part] - (self.L + self.S)[s])
            u = self._u[part] - self._u[s]
            coefficients = [_integral(growth * u**k / math.factorial(k), u)[-1].to(like) for k in range(count)]
            offset = _integral(growth * torch.exp(self.S[s]) * (self.B[part] - self.B[s]), u)[-1]
            factor = torch.exp(self.L[s] - self.L[t])
            self._intervals[key] = IntervalIntegrals(factor.to(like), offset.to(like), coefficients)
        return self._intervals[key]


class EvaluatedNode(NamedTuple):
    """A node, its position in the statistics, and f there."""

    node: Node
    position: int
    f: Tensor


def dpm_solver_v3(
    predict: Predictor, x: Tensor, times: Sequence[float], statistics: Statistics, *, order: int = 2,
    correct: bool = True, pseudo: bool = False,
) -> Tensor:  # fmt: skip
    """The multistep predictor of ``order`` and, with ``correct``, the corrector of the same order; with ``pseudo``, the
    corrector has one order more and derivatives come from nested differences. N evaluations for N steps.

    Nodes move to the nearest log-SNRs of the statistics. A last step to sigma = 0, and steps beyond the range of the
    statistics, are of first order; the order falls towards the end.
    """
    requested = predict.nodes(times)
    indices = list(dict.fromkeys(statistics.index(n.log_snr) for n in requested if n.sigma and n.alpha))
    grid = predict.nodes(predict.schedule.time_of_log_snr(statistics.log_snr[indices]).tolist())
    last = len(grid) - 1
    history: list[EvaluatedNode] = []  # newest first
    previous, used = x, 0
    for i, node in enumerate(grid):
        if i == last and requested[-1].sigma:
            break  # the grid ends here, above sigma = 0
        l = statistics.l[indices[i]].to(x)  # noqa: E741
        entry = EvaluatedNode(node, indices[i], (node.sigma * predict(x, node.t).noise - l * x) / node.alpha)
        if correct and i and used + pseudo > 1:
            entries = [history[0], entry, *history[1:]][: used + pseudo]
            x = take_step(statistics, previous, history[0], entry, entries, pseudo)
        if i == last:
            return (x - l * x) / node.alpha - entry.f  # x0, since e = (alpha f + l x) / sigma
        history = [entry, *history[:3]]
        previous, used = x, min(order, i + 1, last - i)
        x = take_step(statistics, x, entry, EvaluatedNode(grid[i + 1], indices[i + 1], entry.f), history[:used], pseudo)
    return x


def take_step(
    statistics: Statistics, x: Tensor, s: EvaluatedNode, t: EvaluatedNode, history: Sequence[EvaluatedNode],
    pseudo: bool,
) -> Tensor:  # fmt: skip
    """``x_t`` from ``x`` at ``s``, the first of ``history``, by the derivatives of g from its differences."""
    integrals = statistics.integrals(s.position, t.position, len(history), x)
    S, B, S_s, B_s = statistics.S, statistics.B, statistics.S[s.position], statistics.B[s.position]
    g = [torch.exp(S_s - S[n.position]).to(x) * n.f - (torch.exp(S_s) * (B[n.position] - B_s)).to(x) for n in history]
    offsets = [n.node.log_snr - s.node.log_snr for n in history]
    out = x / s.node.alpha - integrals.offset
    all_derivatives = [g[0], *(nested_derivatives if pseudo else derivatives)(g, offsets)]
    for coefficient, derivative in zip(integrals.coefficients, all_derivatives, strict=True):
        out = out - coefficient * derivative
    return t.node.alpha * integrals.factor * out


def derivatives(values: Sequence[Tensor], offsets: Sequence[float]) -> list[Tensor]:
    """The derivatives at the first node (offset 0) of the polynomial through all values."""
    n = len(values) - 1
    if not n:
        return []
    powers = [[r**k / math.factorial(k) for k in range(1, n + 1)] for r in offsets[1:]]
    inverse = torch.linalg.inv(torch.tensor(powers, dtype=torch.float64))
    stacked = torch.stack([value - values[0] for value in values[1:]])
    return list(torch.einsum("kj,j...->k...", inverse.to(stacked), stacked))


def nested_derivatives(values: Sequence[Tensor], offsets: Sequence[float]) -> list[Tensor]:
    """The k-th derivative from the first k + 1 values alone (the paper's pseudo-order): k! times Newton's divided
    difference."""
    table = list(values)
    found = []
    for k in range(1, len(values)):
        table = [(table[j + 1] - table[j]) / (offsets[j + k] - offsets[j]) for j in range(len(table) - 1)]
        found.append(math.factorial(k) * table[0])
    return found


def _integral(values: Tensor, u: Tensor) -> Tensor:
    """The cumulative integral of ``values`` over ``u`` along the first axis, from 0, by the trapezoidal rule."""
    parts = (values[1:] + values[:-1]) / 2 * (u[1:] - u[:-1])
    return torch.cat([torch.zeros_like(values[:1]), parts.cumsum(0)])
