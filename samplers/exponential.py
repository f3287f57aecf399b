"""Exponential integrators in log-SNR: the one kernel of DPM-Solver, DPM-Solver++, UniPC, DC-Solver and their searches.

Let lambda = log(alpha / sigma), m the predicted x0, e the predicted noise. From s to t, with h = lambda_t - lambda_s,
the probability-flow ODE (and with fresh noise z the SDE of the same marginals) is exactly

    data:   x_t = (sigma_t / sigma_s) x_s + alpha_t int_0^h exp(-(h - r)) m(lambda_s + r) dr
    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t int_0^h exp(h - r) e(lambda_s + r) dr
    sde:    x_t = (sigma_t / sigma_s) exp(-h) x_s + alpha_t int_0^h 2 exp(-2 (h - r)) m dr
                  + sigma_t sqrt(1 - exp(-2h)) z

A rule of order p puts the polynomial through p known values in the place of m or e. Its weights are the solution of
``sum_j w_j r_j^k / k! = A_k`` (k < p), where r_j is the log-SNR of value j from lambda_s and A_k the integral of
r^k / k!. The published rules differ in which values they know and in a relaxed A_1 or A_2 (see ``relaxed``), in
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from fewstep.samplers.grids import Node

Form = Literal["data", "noise", "sde"]
Relaxation = Literal["none", "midpoint", "bh1", "published"]
Noise = Callable[[], Tensor]


class ModelValue(Protocol):
    """What the model said of a state."""

    @property
    def x0(self) -> Tensor: ...
    @property
    def noise(self) -> Tensor: ...


class HistoryEntry(NamedTuple):
    """A value of the model: where it was read, and what it said."""

    node: Node
    said: ModelValue


def moments(h: float, count: int) -> list[float]:
    """``A_k = int_0^h exp(-(h - r)) r^k / k! dr`` for k < count and any real h (``inf`` has the first alone)."""
    if math.isinf(h):
        return [1.0][:count]
    if abs(h) < 0.05:  # the recurrence below cancels; ten terms are exact here
        return [sum((-1) ** (j + 1) * h ** (k + j) / math.factorial(k + j) for j in range(1, 11)) for k in range(count)]
    found = [-math.expm1(-h)]
    for k in range(1, count):
        found.append(h**k / math.factorial(k) - found[-1])
    return found


def integrals_of_form(form: Form, h: float, count: int) -> list[float]:
    """The integrals of a form, without its factor alpha_t or -sigma_t."""
    if form == "noise":
        return [(-1) ** (k + 1) * a for k, a in enumerate(moments(-h, count))]
    if form == "sde":
        return [a / 2**k for k, a in enumerate(moments(2 * h, count))]
    return moments(h, count)


def relaxed(a: list[float], h: float, relaxation: Relaxation) -> list[float]:
    """The integrals as published rules have them. With two values, ``midpoint`` (DPM-Solver++ 2M, UniPC's bh2) says
    A_1 = A_0 h / 2, and ``bh1`` A_1 = h^2 / 2 with the sign of A_0. ``published`` is ``midpoint`` and, with three
    values, half of A_2: DPM-Solver++ 3M as in its paper and code, which makes it of order 2. ``none`` is exact."""
    if len(a) == 2 and relaxation in ("midpoint", "published"):
        return [a[0], a[0] * h / 2]
    if len(a) == 2 and relaxation == "bh1":
        return [a[0], math.copysign(h * h / 2, a[0])]
    if len(a) == 3 and relaxation == "published":
        return [a[0], a[1], a[2] / 2]
    return a


def weights(a: Sequence[float], offsets: Sequence[float]) -> list[float]:
    """``w`` with ``sum_j w_j r_j^k / k! = a_k`` for the log-SNRs ``offsets`` r_j of the values; the first is 0."""
    if len(a) == 1:
        return [a[0]]
    if len(a) == 2:
        second = a[1] / offsets[1]
        return [a[0] - second, second]
    scale = max(abs(r) for r in offsets)
    powers = np.vander(np.array(offsets) / scale, len(a), increasing=True).T
    right = [value * math.factorial(k) / scale**k for k, value in enumerate(a)]
    return np.linalg.solve(powers, right).tolist()  # type: ignore[no-any-return]


class Linear(NamedTuple):
    """``x_t = keep x + sum of shares times values + fresh z``; of the values, the first ``len(shares)`` that have a
    finite log-SNR, or the first alone. ``form`` says which quantity the values are."""

    keep: float
    shares: tuple[float, ...]
    fresh: float
    form: Form


@lru_cache(maxsize=4096)
def linear(s: Node, t: Node, log_snrs: tuple[float, ...], form: Form, relaxation: Relaxation) -> Linear:
    """The numbers of a step from values at ``log_snrs``, the first at ``s``: the same for every batch."""
    h = t.log_snr - s.log_snr
    count = 1 if math.isinf(h) else len(log_snrs)
    if form == "noise" and count == 1:
        form = "data"  # the same step, and defined at both ends
    a = relaxed(integrals_of_form(form, h, count), h, relaxation)
    w = weights(a, [value - s.log_snr for value in log_snrs[:count]] if count > 1 else [0.0])
    if form == "noise":
        return Linear(t.alpha / s.alpha, tuple(-t.sigma * share for share in w), 0.0, form)
    keep, fresh = t.sigma / s.sigma, 0.0
    if form == "sde":
        keep, fresh = keep * math.exp(-h), t.sigma * math.sqrt(-math.expm1(-2 * h))
    return Linear(keep, tuple(t.alpha * share for share in w), fresh, form)


def advance(
    x: Tensor, s: Node, t: Node, known: Sequence[HistoryEntry], form: Form = "data", relaxation: Relaxation = "none",
    noise: Noise | None = None,
) -> Tensor:  # fmt: skip
    """``x_t`` from ``x`` at ``s`` and the values ``known``, of which the first was read at ``s``.

    Their number is the order. Into sigma = 0, or out of alpha = 0, the log-SNR is infinite and the step of order one,
    where all forms but ``sde`` agree. ``noise`` is drawn from by ``sde`` alone.
    """
    if len(known) > 1:  # a value where the log-SNR is infinite tells no derivative
        known = [known[0], *(value for value in known[1:] if math.isfinite(value.node.log_snr))]
    step = linear(s, t, tuple(value.node.log_snr for value in known), form, relaxation)
    out = x * step.keep
    for share, value in zip(step.shares, known, strict=False):
        out.add_(value.said.noise if step.form == "noise" else value.said.x0, alpha=share)
    if step.fresh and noise is not None:
        out.add_(noise(), alpha=step.fresh)
    return out
