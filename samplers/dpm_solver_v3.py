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

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_metadata, read_tensors, reading
from fewstep.models.denoiser import Denoiser
from fewstep.samplers.exponential import HistoryEntry, advance
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.provenance import check_model

COMMAND = "fewstep solver fit-v3"
FINER = 4  # points per interval of the statistics in the integrals over exponentials of them


class StepWeights(NamedTuple):
    """A step as ``x_t = state * x_s + constant + sum_j outputs[j] * f_j``, element by element."""

    state: Tensor
    constant: Tensor
    outputs: list[Tensor]


@dataclass(frozen=True)
class Statistics:
    """``l``, ``s``, ``b`` [M + 1, ...] of a network at increasing log-SNRs [M + 1], float64 on the host."""

    log_snr: Tensor
    l: Tensor  # noqa: E741 - the paper's letter
    s: Tensor
    b: Tensor

    @staticmethod
    def read(file: Path, guidance: float | None = None, denoiser: Denoiser | None = None) -> Statistics:
        """Raises ``UserError`` if the file is missing (``fewstep solver fit-v3`` creates it), holds other tensors, or
        records another guidance scale or model than these."""
        tensors = read_tensors(file) if file.is_file() else {}
        if set(tensors) != {"log_snr", "l", "s", "b"}:
            raise UserError(f"DPM-Solver-v3 needs the model's statistics in {file}: run {COMMAND}.")
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise UserError(f"The statistics in {file} are not real numbers: run {COMMAND}.")
        tensors = {name: tensors[name].double() for name in ("log_snr", "l", "s", "b")}
        log_snr, l = tensors["log_snr"], tensors["l"]  # noqa: E741
        metadata = read_metadata(file)
        with reading(file, "file of statistics", f"Run {COMMAND}."):
            if log_snr.ndim != 1 or not len(log_snr) > 1 or not (log_snr.diff() > 0).all():
                raise ValueError("its log-SNRs do not increase")
            if any(tensors[name].shape != l.shape or l.shape[:1] != log_snr.shape for name in "lsb"):
                raise ValueError("its tensors have different shapes")
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("it has values that are not finite")
            recorded = json.loads(metadata.get("settings", "{}")).get("guidance")
            measured = guidance if recorded is None else float(recorded)
        if guidance is not None and measured != guidance:
            raise UserError(
                f"The statistics in {file} were measured at guidance {measured:g} and do not fit guidance "
                f"{guidance:g}: run {COMMAND} --guidance {guidance:g}."
            )
        check_model(file, metadata.get("model"), denoiser, COMMAND)
        return Statistics(**tensors)

    def at(self, nodes: Sequence[Node]) -> StatisticsAtNodes:
        """The statistics for a grid; cached."""
        key = tuple(nodes)
        if key not in self._grids:
            self._grids[key] = StatisticsAtNodes(self, key)
        return self._grids[key]

    @cached_property
    def _grids(self) -> dict[tuple[Node, ...], StatisticsAtNodes]:
        return {}


class StatisticsAtNodes:
    """Statistics, interpolated linearly at the ``nodes`` of a grid (beyond the range of the statistics, their last
    value), with their integrals by the trapezoidal rule and the weights of steps, which are cached."""

    def __init__(self, statistics: Statistics, nodes: Sequence[Node]) -> None:
        self._steps: dict[tuple[object, ...], StepWeights] = {}
        self._slopes: dict[tuple[object, ...], Tensor] = {}
        finite = [node.log_snr for node in nodes if math.isfinite(node.log_snr)]
        own = torch.tensor(finite, dtype=torch.float64)
        fractions = torch.linspace(0, 1, FINER + 1, dtype=torch.float64)[:-1, None]
        between = torch.lerp(statistics.log_snr[:-1], statistics.log_snr[1:], fractions).flatten()
        log_snr = torch.cat([between, statistics.log_snr[-1:], own]).unique()
        self._index = {value: int(torch.searchsorted(log_snr, value)) for value in finite}
        self._l, s, b = (
            _interpolate(v, statistics.log_snr, log_snr) for v in (statistics.l, statistics.s, statistics.b)
        )
        self._u = log_snr.reshape(-1, *[1] * (self._l.ndim - 1))
        self._L, self._S = _integral(self._l, self._u), _integral(s, self._u)
        self._B = _integral(torch.exp(-self._S) * b, self._u)

    def slope(self, node: Node, like: Tensor) -> Tensor:
        """l at a node."""
        key = node, like.device, like.dtype
        if key not in self._slopes:
            self._slopes[key] = self._l[self._index[node.log_snr]].to(like)
        return self._slopes[key]

    def step(self, s: Node, t: Node, history: Sequence[Node], pseudo: bool, like: Tensor) -> StepWeights:
        """The weights of the step from s to t by the derivatives of g from its values at ``history``, first s."""
        key = s, t, tuple(history), pseudo, like.device, like.dtype
        if key not in self._steps:
            self._steps[key] = self._weights(s, t, history, pseudo, like)
        return self._steps[key]

    def _weights(self, s: Node, t: Node, history: Sequence[Node], pseudo: bool, like: Tensor) -> StepWeights:
        first, last = self._index[s.log_snr], self._index[t.log_snr]
        part = slice(first, last + 1)
        u, S, B = self._u[part] - self._u[first], self._S, self._B
        growth = torch.exp((self._L + S)[part] - (self._L + S)[first])
        offset = _integral(growth * torch.exp(S[first]) * (B[part] - B[first]), u)[-1]
        basis = list(torch.eye(len(history), dtype=torch.float64))
        offsets = [node.log_snr - s.log_snr for node in history]
        rows = [basis[0], *(nested_derivatives if pseudo else derivatives)(basis, offsets)]  # of g^(k) by g_j
        integrals = [_integral(growth * u**k / math.factorial(k), u)[-1] for k in range(len(rows))]
        scale = t.alpha * torch.exp(self._L[first] - self._L[last])
        constant, outputs = -scale * offset, []
        for j, node in enumerate(history):
            at = self._index[node.log_snr]
            weight = -scale * sum((row[j] * E for row, E in zip(rows, integrals, strict=True)), torch.zeros(()))
            outputs.append((weight * torch.exp(S[first] - S[at])).to(like))
            constant = constant - weight * torch.exp(S[first]) * (B[at] - B[first])
        return StepWeights((scale / s.alpha).to(like), constant.to(like), outputs)


class EvaluatedNode(NamedTuple):
    """A node and f there."""

    node: Node
    f: Tensor


def dpm_solver_v3(
    predict: Predictor, x: Tensor, times: Sequence[float], statistics: Statistics, *, order: int = 2,
    correct: bool = True, pseudo: bool = False,
) -> Tensor:  # fmt: skip
    """The multistep predictor of ``order`` and, with ``correct``, the corrector of the same order; with ``pseudo``, the
    corrector has one order more and derivatives come from nested differences. N evaluations for N steps.

    Steps from alpha = 0 and to sigma = 0, where the log-SNR is infinite, are of first order, as is the last step; the
    order falls towards the end.
    """
    grid = predict.nodes(times)
    fitted, steps = statistics.at(grid), len(grid) - 1
    history: list[EvaluatedNode] = []  # newest first
    previous, used = x, 0
    for i, (s, t) in enumerate(pairwise(grid)):
        output = predict(x, s.t)
        if not s.alpha:
            x = advance(x, s, t, [HistoryEntry(s, output)])
            continue
        l = fitted.slope(s, x)  # noqa: E741
        entry = EvaluatedNode(s, torch.addcmul(output.noise * s.sigma, l, x, value=-1).div_(s.alpha))
        if correct and history and used + pseudo > 1:
            entries = [history[0], entry, *history[1:]][: used + pseudo]
            x = take_step(fitted, previous, history[0].node, s, entries, pseudo)
        if not t.sigma:
            return t.alpha * ((x - l * x) / s.alpha - entry.f)  # x0, since e = (alpha f + l x) / sigma
        history = [entry, *history[:3]]
        previous, used = x, min(order, len(history), steps - i)
        x = take_step(fitted, x, s, t, history[:used], pseudo)
    return x


def take_step(
    fitted: StatisticsAtNodes, x: Tensor, s: Node, t: Node, history: Sequence[EvaluatedNode], pseudo: bool
) -> Tensor:
    """``x_t`` from ``x`` at ``s``, the first of ``history``, by the derivatives of g from its differences."""
    weights = fitted.step(s, t, [entry.node for entry in history], pseudo, x)
    out = torch.addcmul(weights.constant, weights.state, x)
    for weight, entry in zip(weights.outputs, history, strict=True):
        out.addcmul_(weight, entry.f)
    return out


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


def _interpolate(values: Tensor, points: Tensor, at: Tensor) -> Tensor:
    """``values`` at increasing ``points``, interpolated linearly along the first axis; constant beyond the ends."""
    right = torch.searchsorted(points, at).clamp(1, len(points) - 1)
    fraction = ((at - points[right - 1]) / (points[right] - points[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], fraction.reshape(-1, *[1] * (values.ndim - 1)))
