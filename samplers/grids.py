"""Time grids: N steps have N + 1 nodes, from the noisiest down to 0 or a least time. Floats, computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from fewstep.models.schedules import NoiseSchedule, shift

Spacing = Literal["time", "quadratic", "log_snr", "karras", "exponential", "beta"]
End = Literal["zero", "minimum", "append"]
MOST, LEAST = 0.999, 1e-3  # times that stand for 1 and 0 where the log-SNR there is infinite


class Node(NamedTuple):
    """A time with what a solver needs to know of the schedule there: floats, ``log_snr`` = log(alpha / sigma)."""

    t: float
    alpha: float
    sigma: float
    log_snr: float


def time_uniform(steps: int, factor: float = 1.0) -> tuple[float, ...]:
    """``1, (N-1)/N, ..., 0``, moved towards noise by ``shift``. Raises ``ValueError`` for fewer than one step."""
    _check(steps)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return tuple(shift(t, factor).tolist())


def grid(
    schedule: NoiseSchedule, steps: int, spacing: Spacing = "time", *, factor: float = 1.0, end: End = "zero",
    most: float = 1.0, least: float = LEAST,
) -> tuple[float, ...]:  # fmt: skip
    """N + 1 times from ``most`` (``MOST`` where the log-SNR at 1 is infinite) down to ``least``.

    ``spacing`` is uniform in: ``time``; its root (``quadratic``); the log-SNR (``log_snr``, the same as
    ``exponential``: geometric in sigma / alpha); (sigma / alpha)^(1/7) (``karras``, arXiv 2206.00364); quantiles of
    Beta(0.6, 0.6) over sigma / alpha (``beta``, arXiv 2407.12173). ``factor`` shifts towards noise afterwards. ``end``:
    ``minimum`` stops at ``least``, ``zero`` moves the last node from there to 0, ``append`` spreads one node fewer and
    adds 0, as most published grids do. Raises ``ValueError`` for fewer than one step, times that do not fall, and
    ``beta`` without scipy.
    """
    _check(steps)
    u = np.linspace(0, 1, steps + (end != "append"))
    if spacing == "time":
        times = torch.linspace(most, 0.0 if end == "zero" else least, len(u), dtype=torch.float64)
    elif spacing == "quadratic":
        times = torch.as_tensor(((1 - u) * most**0.5 + u * least**0.5) ** 2)
    else:
        start = torch.tensor([most, least], dtype=torch.float64)
        if not torch.isfinite(schedule.log_snr(start)).all():
            start = start.clamp(LEAST, MOST)
        high, low = np.exp(-schedule.log_snr(start).numpy())
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
        times[0] = start[0]
    times = shift(times, factor)
    if end != "append":
        spread = [*times[:-1].tolist(), 0.0 if end == "zero" else times[-1].item()]
    else:
        spread = [*times.tolist(), 0.0]
    return checked(spread)


def checked(times: Sequence[float]) -> tuple[float, ...]:
    """A grid of one's own, if it is one. Raises ``ValueError`` on fewer than two times or any that do not fall within
    [0, 1]."""
    falling = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not falling or not 0 <= times[-1] < times[0] <= 1:
        raise ValueError(f"a grid is two or more falling times within [0, 1], got {list(times)}")
    return tuple(float(t) for t in times)


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
