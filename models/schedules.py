"""Noise schedules: ``x_t = alpha(t) x0 + sigma(t) noise`` with ``t`` in [0, 1] and ``t = 1`` the noisiest.

All functions take and return float64 tensors of any shape on the host; callers cast once, when a coefficient multiplies
an image. A schedule defines its two curves and their derivatives; everything else follows from them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    """What a schedule provides; ``log_snr`` is ``lambda = log(alpha / sigma)``, half the log signal-to-noise ratio."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...
    def log_snr(self, t: Tensor) -> Tensor: ...
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths, ``alpha = 1 - t`` and ``sigma = t`` (Liu et al., arXiv 2209.03003; Lipman et al., 2210.02747)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class VPLinear:
    """Continuous variance-preserving schedule with linear beta (Song et al., arXiv 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min)) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return self._log_alpha(t) - torch.log(self.sigma(t))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        q = 2 * torch.logaddexp(-2 * log_snr, torch.zeros_like(log_snr))
        return q / (torch.sqrt(self.beta_min**2 + (self.beta_max - self.beta_min) * q) + self.beta_min)


@dataclass(frozen=True)
class VPCosine:
    """Cosine schedule (Nichol & Dhariwal, arXiv 2102.09672), cut off at ``cut``, which is mapped to t = 1."""

    offset: float = 0.008
    cut: float = 0.9946

    def _angle(self, t: Tensor) -> Tensor:
        return (t * self.cut + self.offset) / (1 + self.offset) * (math.pi / 2)

    @property
    def _start(self) -> float:
        return math.cos(self.offset / (1 + self.offset) * math.pi / 2)

    @property
    def _rate(self) -> float:
        return self.cut / (1 + self.offset) * math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t)) / self._start

    def sigma(self, t: Tensor) -> Tensor:
        # start^2 - cos^2(angle) = sin(angle - angle0) sin(angle + angle0), which is accurate near t = 0
        first = self._angle(torch.zeros_like(t))
        return torch.sqrt(torch.sin(self._rate * t) * torch.sin(self._rate * t + 2 * first)) / self._start

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._rate * torch.sin(self._angle(t)) / self._start

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        alpha = torch.exp(-0.5 * torch.logaddexp(-2 * log_snr, torch.zeros_like(log_snr)))
        angle = torch.arccos(alpha * self._start)
        return (angle / (math.pi / 2) * (1 + self.offset) - self.offset) / self.cut


@dataclass(frozen=True)
class VPDiscrete:
    """DDPM betas (Ho et al., arXiv 2006.11239), ``log alpha`` interpolated linearly between ``t_i = (i + 1) / N``.

    A network trained on integer timesteps 0..N-1 receives the timestep ``N t - 1``. Below ``t = 1 / N`` the first
    segment is extended to ``alpha = 1`` at ``t = 0``.
    """

    betas: tuple[float, ...] = field(repr=False)

    @staticmethod
    def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> VPDiscrete:
        """The betas of Stable Diffusion."""
        root = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
        return VPDiscrete(tuple((root**2).tolist()))

    @staticmethod
    def linear(start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> VPDiscrete:
        """The betas of DDPM and PixArt."""
        return VPDiscrete(tuple(torch.linspace(start, end, steps, dtype=torch.float64).tolist()))

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta < 1 for beta in self.betas):
            raise ValueError("noise schedule 'vp_discrete' needs betas between 0 and 1")

    @cached_property
    def _log_alphas(self) -> Tensor:
        betas = torch.tensor(self.betas, dtype=torch.float64)
        return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-betas).cumsum(0)])

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha at ``t`` and its derivative."""
        n = len(self.betas)
        i = (t * n).floor().long().clamp(0, n - 1)
        left, right = self._log_alphas[i], self._log_alphas[i + 1]
        return left + (t * n - i) * (right - left), (right - left) * n

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._segment(t)[0])

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._segment(t)[0]))

    def d_alpha(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._segment(t)
        return slope * torch.exp(log_alpha)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self._segment(t)[0]
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.logaddexp(-2 * log_snr, torch.zeros_like(log_snr))
        n = len(self.betas)
        falling = self._log_alphas.neg()
        i = (torch.searchsorted(falling, -log_alpha.contiguous(), right=True) - 1).clamp(max=n - 1)
        left, right = self._log_alphas[i], self._log_alphas[i + 1]
        return (i + (log_alpha - left) / (right - left)) / n


@dataclass(frozen=True)
class VE:
    """Variance exploding, ``alpha = 1``; time is uniform in Karras et al.'s ``sigma^(1/rho)`` (arXiv 2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return (low + t * (high - low)) ** self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        low, high = self._ends
        return self.rho * (high - low) * (low + t * (high - low)) ** (self.rho - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(self.sigma(t))

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        return (torch.exp(-log_snr / self.rho) - low) / (high - low)


SCHEDULES: dict[str, type] = {
    "rectified_flow": RectifiedFlow,
    "vp_linear": VPLinear,
    "vp_cosine": VPCosine,
    "vp_discrete": VPDiscrete,
    "ve": VE,
}


def schedule_from_dict(settings: dict[str, Any]) -> NoiseSchedule:
    """The inverse of ``schedule_to_dict``. Raises ``ValueError`` on an unknown name or an invalid setting."""
    values = dict(settings)
    name = values.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(SCHEDULES)}")
    cls = SCHEDULES[name]
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"noise schedule {name!r} has no setting {sorted(unknown)}")
    if cls is VPDiscrete:
        values["betas"] = tuple(values.get("betas", ()))
    schedule: NoiseSchedule = cls(**values)
    return schedule


def schedule_to_dict(schedule: NoiseSchedule) -> dict[str, Any]:
    """Name and settings as JSON types. Raises ``ValueError`` on a schedule that is not in ``SCHEDULES``."""
    name = next((name for name, cls in SCHEDULES.items() if type(schedule) is cls), None)
    if name is None:
        raise ValueError(f"no name for a schedule of type {type(schedule).__name__}; known: {', '.join(SCHEDULES)}")
    return {"name": name, **asdict(schedule)}  # type: ignore[call-overload]


def bridge(schedule: NoiseSchedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution of ``x_t`` given ``x_s``, ``s <= t``: ``x_t = scale x_s + std noise``. Returns (scale, std).

    ``std^2 = sigma_t^2 - scale^2 sigma_s^2``, computed with expm1 so that it is never negative; its relative error
    grows no faster than ``1e-16 / (t - s)``. An infinite ``log_snr`` (s = 0 or t = 1) is allowed.
    """
    start, end = schedule.log_snr(s), schedule.log_snr(t)
    scale = schedule.alpha(t) / schedule.alpha(s)
    std = schedule.sigma(t) * torch.sqrt(-torch.expm1(2 * (end - start).clamp(max=0)))
    same = start == end  # here the formulas can give 0 / 0 or inf - inf
    return torch.where(same, 1.0, scale), torch.where(same, 0.0, std)


def shift(t: Tensor, factor: float) -> Tensor:
    """Shifts times towards noise, ``S t / (1 + (S - 1) t)``: for a flow, ``log_snr`` changes by ``-log S``."""
    return factor * t / (1 + (factor - 1) * t)
