"""A denoiser bound to its condition and guidance: what a sampler calls, and what counts its network evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import OFF, Guidance, guide
from fewstep.models.prediction import Kind, conversion
from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.grids import Node

Scalars = tuple[float, float, float, float]  # alpha, sigma and their derivatives at a time


@dataclass
class ModelOutput:
    """What the model says at ``x`` and one time: ``raw`` of kind ``kind``, and views of it. A sampler's time is one for
    the whole batch, so that its coefficients are numbers: a read costs little more than the network."""

    x: Tensor
    raw: Tensor
    kind: Kind
    scalars: Scalars

    @cached_property
    def x0(self) -> Tensor:
        return self.view("x0")

    @cached_property
    def noise(self) -> Tensor:
        return self.view("noise")

    @cached_property
    def velocity(self) -> Tensor:
        return self.view("velocity")

    def view(self, kind: Kind) -> Tensor:
        """The reading as ``kind``; nan where that does not exist."""
        if kind == self.kind:
            return self.raw
        try:
            p, q = conversion(self.kind, kind, *self.scalars)
        except ZeroDivisionError:  # x0 from a noise prediction at alpha = 0, say
            return torch.full_like(self.raw, torch.nan)
        return torch.add(p * self.x, self.raw, alpha=q)


@dataclass
class Predictor:
    """``predictor(x, t) -> Reading``; ``nfe`` counts evaluations a sample, two for a guided one.

    ``threshold``: the dynamic thresholding of Imagen (Saharia et al., arXiv 2205.11487), for models of pixels: x0 is
    clipped at this quantile of its sizes, and divided by it, in samples where that is above 1.
    """

    denoiser: Denoiser
    condition: Condition
    guidance: Guidance = OFF
    threshold: float | None = None
    nfe: int = field(default=0, init=False)
    _scalars: dict[float, Scalars] = field(default_factory=dict, init=False)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: float) -> ModelOutput:
        if self.guidance.scale == 1.0 and not self.denoiser.style.embedded:
            raw = self.denoiser.raw(x, torch.full(x.shape[:1], t, dtype=torch.float64), self.condition)
            self.nfe += 1
        else:
            guided = guide(self.denoiser, x, t, self.condition, self.guidance)
            raw = guided.out.raw
            self.nfe += 1 if guided.null is None else 2
        reading = ModelOutput(x, raw, self.denoiser.kind, self.scalars(t))
        if self.threshold is None:
            return reading
        size = torch.quantile(reading.x0.flatten(1).abs(), self.threshold, dim=1).clamp(min=1)
        size = size.reshape(-1, *[1] * (x.ndim - 1))
        return ModelOutput(x, reading.x0.clamp(-size, size) / size, "x0", reading.scalars)

    def nodes(self, times: Sequence[float]) -> list[Node]:
        """The nodes of falling ``times``; their coefficients are kept for the reads to come."""
        rows = _table(self.schedule, tuple(times))  # type: ignore[arg-type]  # schedules are frozen
        self._scalars |= {row[0]: (row[1], row[2], row[4], row[5]) for row in rows}
        return [Node(*row[:4]) for row in rows]

    def scalars(self, t: float) -> Scalars:
        """The coefficients at a time."""
        if t not in self._scalars:
            self.nodes([t])
        return self._scalars[t]


@lru_cache(maxsize=64)
def _table(schedule: NoiseSchedule, times: tuple[float, ...]) -> list[list[float]]:
    """t, alpha, sigma, log-SNR and the derivatives of alpha and sigma, a row a time: the same for every batch."""
    t = torch.tensor(times, dtype=torch.float64)
    s = schedule
    table: list[list[float]] = torch.stack(
        [t, s.alpha(t), s.sigma(t), s.log_snr(t), s.d_alpha(t), s.d_sigma(t)], 1
    ).tolist()
    return table
