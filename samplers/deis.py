"""tAB-DEIS (Zhang & Chen, arXiv 2204.13902): the predicted noise is extrapolated by a polynomial in time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.predictor import Predictor

QUADRATURE_POINTS = 64


def deis(predict: Predictor, x: Tensor, times: Sequence[float], *, order: int = 3) -> Tensor:
    """``y += sum_j w_j e_j`` for y = x / alpha, with w_j the integral over sigma / alpha of the Lagrange polynomial of
    the j-th newest time. The first step and the one to sigma = 0 are DDIM's. N evaluations.

    (With polynomials in log-SNR instead, as in diffusers, it is the noise form of ``multistep``.)
    """
    past: list[tuple[float, Tensor]] = []  # newest first
    for s, t in pairwise(predict.nodes(times)):
        p = predict(x, s.t)
        past = [(s.t, p.noise), *past[: order - 1]]
        if len(past) == 1 or t.sigma == 0:
            x = t.alpha * p.x0 + t.sigma * p.noise
            continue
        known = tuple(time for time, _ in past)
        weights = adams_bashforth_weights(predict.schedule, known, t.t)  # type: ignore[arg-type]  # as in predictor.py
        x = t.alpha / s.alpha * x
        for weight, (_, noise) in zip(weights, past, strict=True):
            x.add_(noise, alpha=t.alpha * weight)
    return x


@lru_cache(maxsize=1024)
def adams_bashforth_weights(schedule: NoiseSchedule, past: tuple[float, ...], end: float) -> list[float]:
    """The integrals of the Lagrange polynomials of the times ``past`` over rho = sigma / alpha, from ``past[0]`` to
    ``end``. By parts, ``[L rho] - int rho L' dt``, so that their sum is exact, and in float64."""
    points, point_weights = np.polynomial.legendre.leggauss(QUADRATURE_POINTS)
    half = (end - past[0]) / 2
    times = np.array([past[0], end, *((past[0] + end) / 2 + half * points)])
    log_snr = schedule.log_snr(torch.from_numpy(times)).numpy()
    start, stop, *inside = np.exp(-log_snr)
    weights = []
    for j, time in enumerate(past):
        lagrange = Polynomial([1.0])
        for other in (*past[:j], *past[j + 1 :]):
            lagrange *= Polynomial([-other, 1.0]) / (time - other)
        integral = half * np.sum(point_weights * np.array(inside) * lagrange.deriv()(times[2:]))
        weights.append(float(lagrange(end) * stop - lagrange(past[0]) * start - integral))
    return weights
