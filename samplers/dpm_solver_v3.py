"""DPM-Solver-v3 (Zheng et al., arXiv 2310.13268): exponential integration around a linear model of the network itself.

With e the predicted noise, element-wise statistics l, s, b of the network over log-SNR (``statistics.py``) and their
integrals L = int l, S = int s, B = int exp(-S) b, let

    f = (sigma e - l x) / alpha            g(u) = exp(S_s - S_u) f_u - exp(S_s) (B_u - B_s)
    E_k = int_s^t exp((L + S)_u - (L + S)_s) (u - lambda_s)^k / k! du      (k = 0, 1, ..)
    F   = int_s^t exp((L + S)_u - (L + S)_s) exp(S_s) (B_u - B_s) du

Then x_t = alpha_t exp(L_s - L_t) (x_s / alpha_s - F - sum_k E_k g^(k)(lambda_s)). What is left to approximate, g, is as
flat as the statistics can make it; its derivatives come from differences over known nodes. (l, s, b) = (1, 0, 0) is
DPM-Solver++ with Taylor weights, (0, -1, 0) the noise form.
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
    """``exp(L_s - L_t)``, ``F`` and ``E_0 .. E_n`` of a step."""

    keep: Tensor
    F: Tensor
    E: list[Tensor]


@dataclass(frozen=True)
class Statistics:
    """``l``, ``s``, ``b`` [M + 1, ...] of a network at rising log-SNRs [M + 1], float64 on the host."""

    log_snr: Tensor
    l: Tensor  # noqa: E741 - the paper's letter
    s: Tensor
    b: Tensor

    @staticmethod
    def read(file: Path) -> Statistics:
        """Raises ``UserError`` if there is no such file (``fewstep ems`` makes one), or it is none of statistics."""
        if not file.is_file():
            raise UserError(f"DPM-Solver-v3 needs the model's statistics, {file}: make them with fewstep ems.")
        tensors = read_tensors(file)
        if set(tensors) != {"log_snr", "l", "s", "b"}:
            raise UserError(f"{file} holds no statistics of a model: make it with fewstep ems.")
        return Statistics(*(tensors[name].double() for name in ("log_snr", "l", "s", "b")))

    def index(self, log_snr: float) -> int:
        """The nearest node of the grid."""
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
    def _windows(self) -> dict[tuple[int, int, int, torch.device, torch.dtype], IntervalIntegrals]:
        return {}

    def window(self, s: int, t: int, count: int, like: Tensor) -> IntervalIntegrals:
        """The integrals of a step from node s to t (trapezoids), kept: every batch asks for the same."""
        key = s, t, count, like.device, like.dtype
        if key not in self._windows:
            part = slice(s, t + 1)
            growth = torch.exp((self.L + self.S)[part] - (self.L + self.S)[s])
            u = self._u[part] - self._u[s]
            moments = [_integral(growth * u**k / math.factorial(k), u)[-1] for k in range(count)]
            shifted = _integral(growth * torch.exp(self.S[s]) * (self.B[part] - self.B[s]), u)[-1]
            keep = torch.exp(self.L[s] - self.L[t])
            self._windows[key] = IntervalIntegrals(keep.to(like), shifted.to(like), [e.to(like) for e in moments])
        return self._windows[key]


class EvaluatedNode(NamedTuple):
    """A node, its number on the statistics' grid, and f there."""

    node: Node
    at: int
    f: Tensor


def dpm_solver_v3(
    predict: Predictor, x: Tensor, times: Sequence[float], statistics: Statistics, *, order: int = 2,
    correct: bool = True, pseudo: bool = False,
) -> Tensor:  # fmt: skip
    """The multistep predictor of ``order`` and, with ``correct``, the corrector of the same order, ``pseudo`` with one
    order more and derivatives from nested differences. N evaluations for N steps.

    Nodes are moved to the nearest ones of the statistics' grid; a last step to sigma = 0, and what lies beyond the
    statistics, is of first order. The last steps are of lower order.
    """
    whole = predict.nodes(times)
    at = list(dict.fromkeys(statistics.index(n.log_snr) for n in whole if n.sigma and n.alpha))
    grid = predict.nodes(predict.schedule.time_of_log_snr(statistics.log_snr[at]).tolist())
    last = len(grid) - 1
    known: list[EvaluatedNode] = []  # the newest first
    before, used = x, 0
    for i, node in enumerate(grid):
        if i == last and whole[-1].sigma:
            break  # there already
        l = statistics.l[at[i]].to(x)  # noqa: E741
        read = EvaluatedNode(node, at[i], (node.sigma * predict(x, node.t).noise - l * x) / node.alpha)
        if correct and i and used + pseudo > 1:
            x = local(statistics, before, known[0], read, [known[0], read, *known[1:]][: used + pseudo], pseudo)
        if i == last:
            return (x - l * x) / node.alpha - read.f  # x0, of e = (alpha f + l x) / sigma
        known = [read, *known[:3]]
        before, used = x, min(order, i + 1, last - i)
        x = local(statistics, x, read, EvaluatedNode(grid[i + 1], at[i + 1], read.f), known[:used], pseudo)
    return x


def local(
    stats: Statistics, x: Tensor, s: EvaluatedNode, t: EvaluatedNode, known: Sequence[EvaluatedNode], pseudo: bool
) -> Tensor:
    """``x_t`` from ``x`` at ``s``, the first of ``known``, by the derivatives of g that their differences give."""
    at = s.at
    window = stats.window(at, t.at, len(known), x)
    g = [
        torch.exp(stats.S[at] - stats.S[k.at]).to(x) * k.f
        - (torch.exp(stats.S[at]) * (stats.B[k.at] - stats.B[at])).to(x)
        for k in known
    ]
    offsets = [k.node.log_snr - s.node.log_snr for k in known]
    d = [g[0], *(nested_derivatives if pseudo else derivatives)(g, offsets)]
    out = x / s.node.alpha - window.F
    for e, derivative in zip(window.E, d, strict=True):
        out = out - e * derivative
    return t.node.alpha * window.keep * out


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
    difference of theirs."""
    table = list(values)
    found = []
    for k in range(1, len(values)):
        table = [(table[j + 1] - table[j]) / (offsets[j + k] - offsets[j]) for j in range(len(table) - 1)]
        found.append(math.factorial(k) * table[0])
    return found


def _integral(values: Tensor, u: Tensor) -> Tensor:
    """The running integral of ``values`` over ``u`` along the first axis, from 0, by trapezoids."""
    parts = (values[1:] + values[:-1]) / 2 * (u[1:] - u[:-1])
    return torch.cat([torch.zeros_like(values[:1]), parts.cumsum(0)])
