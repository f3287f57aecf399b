"""Time grids: N steps have N + 1 times, from the noisiest down to 0 or a smallest time. Floats, computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.models.schedules import NoiseSchedule, RectifiedFlow, shift
from fewstep.samplers.published_levels import TABLES, align_your_steps, bong_tangent, linear_quadratic

Spacing = Literal[
    "time", "quadratic", "log_snr", "karras", "exponential", "beta", "beta57", "sgm_uniform", "kl_optimal",
    "linear_quadratic", "bong_tangent", "ays_sd15", "ays_sdxl", "ays_svd",
]  # fmt: skip
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
FloatArray = NDArray[np.float64]
End = Literal["zero", "minimum", "append"]
BETA = {"beta": (0.6, 0.6), "beta57": (0.5, 0.7)}
PUBLISHED = ("linear_quadratic", "bong_tangent", *TABLES)
T_MAX, T_MIN = 0.999, 1e-3  # replace times 1 and 0 where the log-SNR there is infinite
START_LOG_SNR = -0.69  # of the noisiest time given by hand: alpha / sigma = 1/2; above, samples lack half of the signal


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
    geometric in sigma / alpha); (sigma / alpha)^(1/7) (``karras``, arXiv 2206.00364). ``beta`` takes quantiles of
    Beta(0.6, 0.6) (arXiv 2407.12173): over time on a flow, as the paper does, and over sigma / alpha on other
    schedules, as diffusers does. ``beta57`` (RES4LYF) takes those of Beta(0.5, 0.7) over time. ``sgm_uniform``
    (ComfyUI) is uniform in time down to ``t_min``, ``kl_optimal`` (arXiv 2404.14507, Theorem 3.1) in
    arctan(sigma / alpha). ``factor`` then shifts the times towards noise.

    ``linear_quadratic``, ``bong_tangent`` and the tables ``ays_…`` are published noise levels, which run from ``t_max``
    to 0 and are not shifted (``published_levels``). Those of the tables are sigma / alpha; the others are fractions of
    the largest time on a flow, of the largest sigma / alpha on other schedules.

    ``end``: ``minimum`` stops at
    ``t_min``, ``zero`` moves the last time from there to 0, ``append`` spaces one time fewer and adds 0, as most
    published grids do; what is uniform in time is spaced down to 0 itself if ``end`` is ``zero``.

    Raises ``UserError`` on an unknown spacing, and ``ValueError`` for fewer than one step, times that do not decrease,
    and ``beta`` without scipy.
    """
    if spacing not in SPACINGS:
        raise UserError(f"Unknown grid {spacing!r}{nearest(spacing, SPACINGS)}.")
    _check_steps(steps)
    if not 0 <= t_min < t_max:
        raise ValueError(f"its smallest time must lie between 0 and {t_max:g}, got {t_min:g}")
    if spacing in PUBLISHED:
        if end != "zero":
            raise ValueError(f"it ends at 0, not with end={end!r}")
        return _published(schedule, steps, spacing, t_max)
    u = np.linspace(0, 1, steps + (end != "append"))
    last = 0.0 if end == "zero" else t_min
    if spacing == "time":
        times = torch.linspace(t_max, last, len(u), dtype=torch.float64)
    elif is_over_time(schedule, spacing):
        times = torch.as_tensor(last + (t_max - last) * _beta_quantiles(1 - u, *BETA[spacing]))
    elif spacing == "sgm_uniform":
        times = torch.linspace(t_max, t_min, len(u), dtype=torch.float64)
    elif spacing == "quadratic":
        times = torch.as_tensor(((1 - u) * t_max**0.5 + u * t_min**0.5) ** 2)
    else:
        ends = torch.tensor([t_max, t_min], dtype=torch.float64)
        finite = schedule.log_snr(ends).isfinite()
        if not finite[1]:
            raise ValueError(f"its smallest time must lie above 0 on this schedule, got {t_min:g}")
        ends = ends.where(finite, T_MAX)
        high, low = np.exp(-schedule.log_snr(ends).numpy())
        if spacing in ("log_snr", "exponential"):
            rho = high ** (1 - u) * low**u
        elif spacing == "karras":
            rho = ((1 - u) * high ** (1 / 7) + u * low ** (1 / 7)) ** 7
        elif spacing == "kl_optimal":
            rho = np.tan((1 - u) * np.arctan(high) + u * np.arctan(low))
        else:
            rho = low + (high - low) * _beta_quantiles(1 - u, *BETA[spacing])
        times = schedule.time_of_log_snr(-torch.log(torch.as_tensor(rho)))
        times[0] = ends[0]
    spaced = shift(times, factor).tolist()
    if end == "append":
        return check_times([*spaced, 0.0])
    return check_times([*spaced[:-1], 0.0 if end == "zero" else spaced[-1]])


def _published(schedule: NoiseSchedule, steps: int, spacing: str, t_max: float) -> tuple[float, ...]:
    """The times of a spacing that is published as noise levels, from ``t_max`` to 0."""
    if spacing in TABLES:
        levels = torch.tensor(align_your_steps(spacing, steps)[1:-1], dtype=torch.float64)
        times = schedule.time_of_log_snr(-levels.log())
    else:
        rule = linear_quadratic if spacing == "linear_quadratic" else bong_tangent
        levels = torch.tensor(rule(steps)[1:-1], dtype=torch.float64)
        largest = schedule.log_snr(torch.tensor(t_max, dtype=torch.float64))
        flow = isinstance(schedule, RectifiedFlow)
        times = t_max * levels if flow else schedule.time_of_log_snr(largest - levels.log())
    return check_times([t_max, *times.tolist(), 0.0])


def respace(levels: Tensor, spacing: str) -> Tensor:
    """Noise levels [N] of a flow, spaced again between the first and the last: ``karras``, ``exponential`` and ``beta``
    over sigma itself, as diffusers' flow schedulers do (in ``grid``, they are over sigma / alpha or over time)."""
    high, low = levels[0].item(), levels[-1].item()
    u = np.linspace(0, 1, len(levels))
    if spacing == "karras":
        return torch.as_tensor(((1 - u) * high ** (1 / 7) + u * low ** (1 / 7)) ** 7)
    if spacing == "exponential":
        return torch.as_tensor(high ** (1 - u) * low**u)
    if spacing == "beta":
        return torch.as_tensor(low + (high - low) * _beta_quantiles(1 - u, *BETA["beta"]))
    raise ValueError(f"the spacing {spacing!r} does not apply to a flow's sigmas")


def grid_of(
    schedule: NoiseSchedule, steps: int, text: str, *, factor: float = 1.0, t_max: float = 1.0
) -> tuple[float, ...]:
    """The grid down to 0 that a text describes: a spacing, optionally with its smallest time above 0
    (``log_snr:0.02``), or the times themselves, after the shift (``times:1,0.9,0.75,0.5``, with or without the 0).
    Raises ``UserError``."""
    name, colon, argument = text.partition(":")
    if name not in (*SPACINGS, "times"):
        raise UserError(f"Unknown grid {name!r}{nearest(name, [*SPACINGS, 'times'])}.")
    try:
        if name == "times":
            return _custom_times(schedule, argument, steps, t_max)
        if colon and (name in PUBLISHED or is_over_time(schedule, name)):
            raise UserError(f"The grid {name!r} ends at 0 here, so it takes no smallest time.")
        t_min = float(argument) if colon else T_MIN
        return grid(schedule, steps, cast(Spacing, name), factor=factor, t_max=t_max, t_min=t_min)
    except ValueError as error:
        raise UserError(f"The grid {text!r} does not work: {error}.") from error


def _custom_times(schedule: NoiseSchedule, text: str, steps: int, t_max: float) -> tuple[float, ...]:
    times = [float(part) for part in text.split(",")]
    times = times if times[-1] == 0 else [*times, 0.0]
    if len(times) != steps + 1:
        raise ValueError(f"it has {len(times) - 1} steps, but {steps} were requested")
    times = list(check_times([min(times[0], t_max), *times[1:]]))
    if times[0] < 1 and schedule.log_snr(torch.tensor(times[0], dtype=torch.float64)) > START_LOG_SNR:
        raise ValueError(f"sampling starts from noise alone, so its first time must lie near 1, got {times[0]:g}")
    return tuple(times)


def given_steps(text: str) -> int | None:
    """The number of steps of a grid that lists its times, as ``times:1,0.5`` does."""
    name, _, argument = text.partition(":")
    return len([part for part in argument.split(",") if part.strip(" 0.")]) if name == "times" else None


def is_over_time(schedule: NoiseSchedule, spacing: str) -> bool:
    """Whether a spacing divides time itself."""
    return spacing in ("time", "beta57") or (spacing == "beta" and isinstance(schedule, RectifiedFlow))


def _beta_quantiles(fraction: FloatArray, a: float, b: float) -> FloatArray:
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ValueError("its quantiles need scipy: pip install 'fewstep[eval]'") from error
    quantiles: FloatArray = beta.ppf(fraction, a, b)
    return quantiles


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """``times`` as a tuple of floats. Raises ``ValueError`` unless they are two or more decreasing times in [0, 1]."""
    decreasing = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not decreasing or not 0 <= times[-1] < times[0] <= 1:
        raise ValueError(f"a grid needs two or more decreasing times within [0, 1], got {list(times)}")
    return tuple(float(t) for t in times)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
