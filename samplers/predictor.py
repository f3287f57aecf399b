"""A denoiser with its condition and guidance, as samplers call it; it counts the network evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import UNGUIDED, Guidance, guide
from fewstep.models.prediction import Kind, conversion
from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.grids import Node, check_times

HALF = (torch.float16, torch.bfloat16)
Scalars = tuple[float, float, float, float]  # alpha, sigma and their derivatives at a time


@dataclass
class ModelOutput:
    """The network output ``raw`` of kind ``kind`` at ``x`` and a single time, and views of it as other kinds.

    In contrast to ``Prediction``, the coefficients are plain numbers, since the whole batch has one time; a conversion
    costs little beside the network.
    """

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
        """The output as ``kind``. Raises ``UserError`` where that is undefined."""
        if kind == self.kind:
            return self.raw
        try:
            p, q = conversion(self.kind, kind, *self.scalars)
        except ZeroDivisionError as error:
            raise UserError(
                f"A prediction of {self.kind} does not determine {kind} where alpha = {self.scalars[0]:g} and sigma = "
                f"{self.scalars[1]:g}: choose a grid that starts below t = 1 and evaluates the model above t = 0."
            ) from error
        return torch.add(p * self.x, self.raw, alpha=q)


@dataclass
class Predictor:
    """``predictor(x, t) -> ModelOutput``; ``nfe`` counts network evaluations per sample, two for a guided call.

    ``threshold``: the quantile of Imagen's dynamic thresholding (Saharia et al., arXiv 2205.11487), for pixel models:
    samples whose quantile of abs(x0) exceeds 1 are clipped to it and divided by it. ``input_dtype``: that of the
    network's input, by default that of the state, which must be float32 or float64.
    """

    denoiser: Denoiser
    condition: Condition
    guidance: Guidance = UNGUIDED
    threshold: float | None = None
    input_dtype: torch.dtype | None = None
    nfe: int = field(default=0, init=False)
    _scalars: dict[float, Scalars] = field(default_factory=dict, init=False)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: float) -> ModelOutput:
        if x.dtype in HALF:
            raise UserError(
                f"A solver's state must be float32 or float64, not {x.dtype}: call a Solver, or convert it."
            )
        seen = x if self.input_dtype is None else x.to(self.input_dtype)
        if self.guidance.scale == 1.0 and not self.denoiser.style.embedded:
            raw = self.denoiser.raw(seen, torch.full(x.shape[:1], t, dtype=torch.float64), self.condition)
            self.nfe += 1
        else:
            guided = guide(self.denoiser, seen, t, self.condition, self.guidance)
            raw = guided.out.raw
            self.nfe += 1 if guided.null is None else 2
        output = ModelOutput(x, raw, self.denoiser.kind, self.scalars(t))
        if self.threshold is None:
            return output
        limit = torch.quantile(output.x0.flatten(1).abs(), self.threshold, dim=1).clamp(min=1)
        limit = limit.reshape(-1, *[1] * (x.ndim - 1))
        return ModelOutput(x, output.x0.clamp(-limit, limit) / limit, "x0", output.scalars)

    def nodes(self, times: Sequence[float]) -> list[Node]:
        """The nodes of decreasing ``times``; their coefficients are cached for later calls. Raises ``ValueError`` on
        other times."""
        if len(times) > 1:
            check_times(times)
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
    """Per time a row of t, alpha, sigma, log-SNR and the derivatives of alpha and sigma; cached across batches."""
    t = torch.tensor(times, dtype=torch.float64)
    s = schedule
    table: list[list[float]] = torch.stack(
        [t, s.alpha(t), s.sigma(t), s.log_snr(t), s.d_alpha(t), s.d_sigma(t)], 1
    ).tolist()
    return table
