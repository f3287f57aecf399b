"""Exponential integrators in log-SNR: the common kernel of DPM-Solver, DPM-Solver++, UniPC and DC-Solver.

Let lambda = log(alpha / sigma), m the predicted x0, e the predicted noise. From s to t, with h = lambda_t - lambda_s,
the probability-flow ODE (and with fresh noise z the SDEs of the same marginals, with the stochasticity tau) is exactly

    data:   x_t = (sigma_t / sigma_s) x_s + alpha_t int_0^h exp(-(h - r)) m(lambda_s + r) dr
    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t int_0^h exp(h - r) e(lambda_s + r) dr
    sde:    x_t = (sigma_t / sigma_s) exp(-tau^2 h) x_s + alpha_t int_0^h c exp(-c (h - r)) m dr
                  + sigma_t sqrt(1 - exp(-2 tau^2 h)) z,     c = 1 + tau^2

tau = 1 is the SDE of SDE-DPM-Solver++, tau = 0 the ODE.

A rule of order p replaces m or e by the polynomial through p model outputs. Its weights solve
``sum_j w_j r_j^k / k! = A_k`` (k < p), where r_j is the log-SNR of output j relative to lambda_s and A_k the integral
with r^k / k!. The published rules differ only in the outputs they use and in a relaxed A_1 or A_2 (see ``relax``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from torch import Tensor

from fewstep.samplers.grids import Node

Form = Literal["data", "noise", "sde"]
Relaxation = Literal["none", "midpoint", "bh1", "published"]
Noise = Callable[[], Tensor]


class ModelValue(Protocol):
    """A model output as x0 and as noise."""

    @property
    def x0(self) -> Tensor: ...
    @property
    def noise(self) -> Tensor: ...


class HistoryEntry(NamedTuple):
    """A node and the model output there."""

    node: Node
    output: ModelValue


def exponential_integrals(h: float, count: int) -> list[float]:
    """``A_k = int_0^h exp(-(h - r)) r^k / k! dr`` for k < count and any real h; for ``h = inf``, A_0 alone."""
    if math.isinf(h):
        return [1.0][:count]
    if abs(h) < 0.05:  # the recurrence below suffers from cancellation; ten terms are exact here
        return [sum((-1) ** (j + 1) * h ** (k + j) / math.factorial(k + j) for j in range(1, 11)) for k in range(count)]
    integrals = [-math.expm1(-h)]
    for k in range(1, count):
        integrals.append(h**k / math.factorial(k) - integrals[-1])
    return integrals


def form_integrals(form: Form, h: float, count: int, tau: float = 1.0) -> list[float]:
    """The integrals A_k of a form, without its factor alpha_t or -sigma_t."""
    if form == "noise":
        return [(-1) ** (k + 1) * a for k, a in enumerate(exponential_integrals(-h, count))]
    if form == "sde":
        c = 1 + tau**2
        return [a / c**k for k, a in enumerate(exponential_integrals(c * h, count))]
    return exponential_integrals(h, count)


def relax(a: list[float], h: float, relaxation: Relaxation) -> list[float]:
    """The integrals as published rules approximate them; ``none`` leaves them exact.

    With two outputs, ``midpoint`` (DPM-Solver++ 2M, UniPC's bh2) sets A_1 = A_0 h / 2, and ``bh1`` A_1 = h^2 / 2 with
    the sign of A_0. ``published`` is ``midpoint`` and, with three outputs, halves A_2 as the paper and code of
    DPM-Solver++ 3M do, which makes it of order 2.
    """
    if len(a) == 2 and relaxation in ("midpoint", "published"):
        return [a[0], a[0] * h / 2]
    if len(a) == 2 and relaxation == "bh1":
        return [a[0], math.copysign(h * h / 2, a[0])]
    if len(a) == 3 and relaxation == "published":
        return [a[0], a[1], a[2] / 2]
    return a


def solve_weights(a: Sequence[float], offsets: Sequence[float]) -> list[float]:
    """``w`` with ``sum_j w_j r_j^k / k! = a_k`` for the relative log-SNRs ``offsets`` r_j, of which the first is 0."""
    if len(a) == 1:
        return [a[0]]
    if len(a) == 2:
        second = a[1] / offsets[1]
        return [a[0] - second, second]
    scale = max(abs(r) for r in offsets)
    powers = np.vander(np.array(offsets) / scale, len(a), increasing=True).T
    right = [value * math.factorial(k) / scale**k for k, value in enumerate(a)]
    return np.linalg.solve(powers, right).tolist()  # type: ignore[no-any-return]


class ExponentialWeights(NamedTuple):
    """A step as ``x_t = state x + sum_j outputs[j] y_j + noise z``, where y_j is the j-th model output: as noise if
    ``form`` is ``noise``, otherwise as x0. For an infinite log-SNR, only the first output has a weight."""

    state: float
    outputs: tuple[float, ...]
    noise: float
    form: Form


@lru_cache(maxsize=4096)
def exponential_weights(
    s: Node, t: Node, log_snrs: tuple[float, ...], form: Form, relaxation: Relaxation, tau: float = 1.0
) -> ExponentialWeights:
    """The weights of a step from outputs at ``log_snrs``, the first at ``s``; cached across batches. Raises
    ``ValueError`` on an unknown form or relaxation."""
    h = t.log_snr - s.log_snr
    count = 1 if math.isinf(h) else len(log_snrs)
    if form == "noise" and count == 1:
        form = "data"  # the same step, and defined at both ends
    if form == "sde" and tau == 0:
        form = "data"
    if form not in get_args(Form) or relaxation not in get_args(Relaxation):
        raise ValueError(f"there is no form {form!r} or no relaxation {relaxation!r}")
    a = relax(form_integrals(form, h, count, tau), h, relaxation)
    w = solve_weights(a, [value - s.log_snr for value in log_snrs[:count]])
    if form == "noise":
        return ExponentialWeights(t.alpha / s.alpha, tuple(-t.sigma * weight for weight in w), 0.0, form)
    state, noise = t.sigma / s.sigma, 0.0
    if form == "sde":
        state, noise = state * math.exp(-(tau**2) * h), t.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))
    return ExponentialWeights(state, tuple(t.alpha * weight for weight in w), noise, form)


def advance(
    x: Tensor, s: Node, t: Node, history: Sequence[HistoryEntry], form: Form = "data", relaxation: Relaxation = "none",
    noise: Noise | None = None, tau: float = 1.0,
) -> Tensor:  # fmt: skip
    """``x_t`` from ``x`` at ``s`` and the model outputs ``history``, the first of which is at ``s``.

    The number of outputs is the order. Steps to sigma = 0 or from alpha = 0, where the log-SNR is infinite, are of
    first order; all forms but ``sde`` agree there. Only ``sde`` uses ``tau`` and ``noise``; without ``noise``, its
    noise term is left out.
    """
    # an output at an infinite log-SNR gives no derivative
    history = [history[0], *(entry for entry in history[1:] if math.isfinite(entry.node.log_snr))]
    weights = exponential_weights(s, t, tuple(entry.node.log_snr for entry in history), form, relaxation, tau)
    out = x * weights.state
    for weight, entry in zip(weights.outputs, history, strict=False):
        out.add_(entry.output.noise if weights.form == "noise" else entry.output.x0, alpha=weight)
    if weights.noise and noise is not None:
        out.add_(noise(), alpha=weights.noise)
    return out
