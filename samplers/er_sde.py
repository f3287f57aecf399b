"""ER-SDE-Solver-1, -2, -3 (Cui et al., arXiv 2309.06169): reverse SDEs whose noise a scaling function determines.

With rho = sigma / alpha, y = x / alpha, m the predicted x0 and a scaling function phi, a step from s to t is

    y_t = r y_s + (1 - r) m + sum_k (h^k / k! + phi(rho_t) I_k) m^(k) + sqrt(rho_t^2 - r^2 rho_s^2) z,
    r = phi(rho_t) / phi(rho_s),   h = rho_t - rho_s,   I_k = int_(rho_t)^(rho_s) (u - rho_s)^(k - 1) / phi(u) du

for k up to the stages minus 1, with the derivatives m^(k) by rho from differences. phi(u) = u is the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from fewstep.samplers.exponential import Noise
from fewstep.samplers.predictor import Predictor

Scaling = Callable[[float], float]
QUADRATURE_POINTS = 64


def released_scaling(rho: float) -> float:
    """``rho (exp(rho^0.3) + 10)``, the default of the released code."""
    return rho * (math.exp(rho**0.3) + 10)


def er_sde(
    predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None, *, stages: int = 3,
    scaling: Scaling = released_scaling,
) -> Tensor:  # fmt: skip
    """``stages`` 1 to 3. A step from alpha = 0 renoises x0, a step to sigma = 0 returns it. N evaluations.

    The released code approximates the integrals by sums of 200 terms.
    """
    past: list[tuple[float, Tensor, Tensor | None]] = []  # rho, x0 and its slope, newest first
    for s, t in pairwise(predict.nodes(times)):
        m = predict(x, s.t).x0
        if t.sigma == 0 or s.alpha == 0:
            x = t.alpha * m
            if t.sigma and noise is not None:
                x = x + t.sigma * noise()
            continue
        rho_s, rho_t = s.sigma / s.alpha, t.sigma / t.alpha
        r, slope = scaling(rho_t) / scaling(rho_s), None
        x = t.alpha / s.alpha * r * x + t.alpha * (1 - r) * m
        weights = derivative_weights(rho_s, rho_t, scaling)
        if stages > 1 and past:
            slope = (m - past[0][1]) / (rho_s - past[0][0])
            x.add_(slope, alpha=t.alpha * weights[0])
        if stages > 2 and slope is not None and past[0][2] is not None:
            curvature = (slope - past[0][2]) / ((rho_s - past[1][0]) / 2)
            x.add_(curvature, alpha=t.alpha * weights[1])
        if noise is not None:
            x = x + t.alpha * math.sqrt(max(0.0, rho_t**2 - r**2 * rho_s**2)) * noise()
        past = [(rho_s, m, slope), *past[:1]]
    return x


@lru_cache(maxsize=1024)
def derivative_weights(rho_s: float, rho_t: float, scaling: Scaling) -> tuple[float, float]:
    """The factors of m' and m'' over alpha_t; the integrals by Gauss-Legendre quadrature in log rho."""
    points, point_weights = np.polynomial.legendre.leggauss(QUADRATURE_POINTS)
    half = math.log(rho_s / rho_t) / 2
    u = rho_t * np.exp(half * (points + 1))
    density = half * point_weights * u / np.array([scaling(float(value)) for value in u])
    h = rho_t - rho_s
    first = h + scaling(rho_t) * float(density.sum())
    return first, h**2 / 2 + scaling(rho_t) * float((density * (u - rho_s)).sum())
