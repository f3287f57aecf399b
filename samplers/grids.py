"""Time grids: N steps have N + 1 times, from the noisiest down to 0 or a smallest time. Floats, computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from fewstep.models.schedules import NoiseSchedule, shift

Spacing = Literal["time", "quadratic", "log_snr", "karras", "exponential", "beta"]
End = Literal["zero", "minimum", "append"]
T_MAX, T_MIN = 0.999, 1e-3  # replace times 1 and 0 where the log-SNR there is infinite


class Node(NamedTuple):
    """A time with the values of the schedule that a solver needs; ``log_snr`` = log(alpha / sigma)."""

    t: float
    alpha: float
    sigma: float
    log_snr: float


def time_uniform(steps: int, factor: float = 1.0) -> tuple[float, ...]:
    """``1, (N-1)/N, ..., 0``, moved towards noise by ``shift``. Raises ``ValueError`` for fewer than one step."""
    _check_steps(steps)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return tuple(shift(t, factor).tolist())


def grid(
    schedule: NoiseSchedule, steps: int, spacing: Spacing = "time", *, factor: float = 1.0, end: End = "zero",
    t_max: float = 1.0, t_min: float = T_MIN,
) -> tuple[float, ...]:  # fmt: skip
    """N + 1 times from ``t_max`` (use ``T_MAX`` if the log-SNR at 1 is infinite) down to ``t_min``.

    ``spacing`` is uniform in: ``time``; its square root (``quadratic``); the log-SNR (``log_snr``, or ``exponential``:
    geometric in sigma / alpha); (sigma / alpha)^(1/7) (``karras``, arXiv 2206.00364); quantiles of Beta(0.6, 0.6) over
    sigma / alpha (``beta``, arXiv 2407.12173). ``factor`` then shifts the times towards noise. ``end``: ``minimum``
    stops at ``t_min``, ``zero`` moves the last time from there to 0, ``append`` spaces one time fewer and adds 0, as
    most published grids do. Raises ``ValueError`` for fewer than one step, for times that do not decrease, and for
    ``beta`` without scipy.
    """
    _check_steps(steps)
    u = np.linspace(0, 1, steps + (end != "append"))
    if spacing == "time":
        times = torch.linspace(t_max, 0.0 if end == "zero" else t_min, len(u), dtype=torch.float64)
    elif spacing == "quadratic":
        times = torch.as_tensor(((1 - u) * t_max**0.5 + u * t_min**0.5) ** 2)
    else:
        ends = torch.tensor([t_max, t_min], dtype=torch.float64)
        if not torch.isfinite(schedule.log_snr(ends)).all():
            ends = ends.clamp(T_MIN, T_MAX)
        high, low = np.exp(-schedule.log_snr(ends).numpy())
        if spacing in ("log_snr", "exponential"):
            rho = high ** (1 - u) * low**u
        elif spacing == "karras":
            rho = ((1 - u) * high ** (1 / 7) + u * low ** (1 / 7)) ** 7
        else:
            try:
                from scipy.stats import beta
            except ImportError as error:
                raise ValueError("its quantiles need scipy: pip install 'fewstep[eval]'") from error
            rho = low + (high - low) * beta.ppf(1 - u, 0.6, 0.6)
        times = schedule.time_of_log_snr(-torch.log(torch.as_tensor(rho)))
        times[0] = ends[0]
    spaced = shift(times, factor).tolist()
    if end == "append":
        return check_times([*spaced, 0.0])
    return check_times([*spaced[:-1], 0.0 if end == "zero" else spaced[-1]])


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """``times`` as a tuple of floats. Raises ``ValueError`` unless they are two or more decreasing times in [0, 1]."""
    decreasing = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not decreasing or not 0 <= times[-1] < times[0] <= 1:
        raise ValueError(f"a grid needs two or more decreasing times within [0, 1], got {list(times)}")
    return tuple(float(t) for t in times)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
