"""Laws of times: the noise levels at which samples are re-noised, critics trained, and rollouts evaluated.

A law is a distribution on [0, 1] (``kind``), shifted towards noise by ``shift`` and kept within ``low`` and ``high``.
Both bounds are noise levels, that is, times after the shift. ``clamp`` is how they act: ``before`` (default) restricts
the distribution, so that no value is more likely than its neighbours; ``after`` moves the times outside to the bound.

    DMD2                             {low: 0.02, high: 0.98}
    Self-Forcing, LightX2V           {shift: 5, low: 0.02, high: 0.98, clamp: after}
    FastGen ``shifted``              {shift: 5, low: 0.001, high: 0.999, clamp: after}      to a thousandth
    Stable Diffusion 3's pretraining {kind: logit_normal}          (arXiv 2403.03206)
    the times of a 4-step sampler    {kind: grid, steps: 4, shift: 3}
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, GetJsonSchemaHandler, model_validator
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.stage import MAX_COUNT, BaseConfig
from fewstep.models.schedules import shift

PARAMETERS = {"uniform": (), "logit_normal": ("mean", "std"), "beta": ("alpha", "beta"), "grid": ("steps",)}


class TimeLaw(BaseConfig):
    """A distribution of times. ``kind``, before the shift:

    ``uniform``. ``logit_normal``: sigmoid(N(``mean``, ``std``^2)). ``beta``: Beta(``alpha``, ``beta``), both at least
    1/2. ``grid``: one of 1/``steps``, 2/``steps``, ..., 1, each equally likely.
    """

    short: ClassVar[str] = "kind"  # the setting that a single word instead of a mapping stands for
    kind: Literal["uniform", "logit_normal", "beta", "grid"] = "uniform"
    shift: float = Field(1.0, ge=1e-4, le=1e4)
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)
    clamp: Literal["before", "after"] = "before"
    mean: float = Field(0.0, ge=-100, le=100)
    std: float = Field(1.0, ge=1e-4, le=100)
    alpha: float = Field(1.0, ge=0.5, le=100)
    beta: float = Field(1.0, ge=0.5, le=100)
    steps: int | None = Field(None, ge=1, le=MAX_COUNT)

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {cls.short: value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} must not be above high={self.high:g}")
        for kind, names in PARAMETERS.items():
            unused = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if unused and kind != self.kind:
                raise ValueError(f"{unused[0]} is a setting of kind {kind}, not of {self.kind}")
        if self.kind == "grid" and self.steps is None:
            raise ValueError("kind grid needs steps, the number of its times")
        if not self.covers(0.0, 1.0):
            raise ValueError(f"none of the {self.steps} times of the grid lies between low and high")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        mapping = handler(core_schema)
        words = handler.resolve_ref_schema(mapping)["properties"][cls.short]["enum"]
        return {"anyOf": [{"enum": words}, mapping]}

    def __str__(self) -> str:
        parameters = ", ".join(f"{getattr(self, name):g}" for name in PARAMETERS[self.kind])
        shifted = f" shifted by {self.shift:g}" if self.shift != 1 else ""
        how = "clamped to" if self.clamp == "after" else "on"
        return f"{self.kind}{parameters and f'({parameters})'}{shifted} {how} {self.low:g} to {self.high:g}"

    def sample(
        self, random: KeyedRandom, size: int, stream: str = "time", *, above: Tensor | float = 0.0,
        below: Tensor | float = 1.0,
    ) -> Tensor:  # fmt: skip
        """``size`` times, float64 on the host, of the law restricted to ``above`` .. ``below`` (numbers or [size]). A
        range outside ``low`` .. ``high`` gives the nearer bound."""
        above, below = (torch.as_tensor(bound, dtype=torch.float64) for bound in (above, below))
        low = above.clamp(min=self.low)
        high = torch.maximum(below.clamp(max=self.high), low)
        first, last = self._quantiles(*((low, high) if self.clamp == "before" else (above, below)))
        u = first + random.uniform(size, stream=stream) * (last - first)
        return shift(self._inverse(u), self.shift).clamp(low, high)

    def covers(self, above: float, below: float) -> bool:
        """Whether the law has times between ``above`` and ``below``."""
        low, high = max(above, self.low), min(below, self.high)
        first, last = self._quantiles(*torch.tensor([low, high], dtype=torch.float64))
        return low <= high and (self.kind != "grid" or bool(last > first))

    def _quantiles(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities, before the shift, of times below ``low`` and of times up to ``high``."""
        low, high = (shift(bound, 1 / self.shift).clamp(0, 1) for bound in (low, high))
        if self.kind == "uniform":
            return low, high
        if self.kind == "logit_normal":
            first, last = (torch.special.ndtr((torch.logit(u) - self.mean) / self.std) for u in (low, high))
            return first, last
        if self.kind == "beta":
            first, last = (torch.as_tensor(np.interp(u, *_beta(self.alpha, self.beta))) for u in (low, high))
            return first, last
        assert self.steps is not None
        inside = 1e-9  # a grid time counts as in the range that it bounds
        first = (torch.ceil(self.steps * low - inside) - 1).clamp(min=0) / self.steps
        return first, torch.floor(self.steps * high + inside) / self.steps

    def _inverse(self, u: Tensor) -> Tensor:
        """The times before the shift below which the probability is ``u``."""
        if self.kind == "logit_normal":
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        if self.kind == "beta":
            times, probability = _beta(self.alpha, self.beta)
            return torch.as_tensor(np.interp(u, probability, times))
        if self.kind == "grid":
            assert self.steps is not None
            return torch.ceil(self.steps * u - 1e-9).clamp(min=1) / self.steps
        return u


@cache
def _beta(alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and the cumulative probability of Beta(alpha, beta) there, by quadrature in theta with
    ``t = sin^2 theta``, where the density is bounded."""
    theta = np.linspace(0, math.pi / 2, 20_001)
    density = np.sin(theta) ** (2 * alpha - 1) * np.cos(theta).clip(min=0) ** (2 * beta - 1)
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sin(theta) ** 2, total / total[-1]


class RenoiseTimes(TimeLaw):
    """A law that avoids both ends of the noise range, as DMD's (arXiv 2311.18828), where the normaliser degenerates."""

    low: float = Field(0.02, ge=0, le=1)
    high: float = Field(0.98, ge=0, le=1)


class CappedTimes(RenoiseTimes):
    """A law at ``all`` levels, or only at those ``cleaner`` than the time at which the student was evaluated."""

    short: ClassVar[str] = "within"
    within: Literal["all", "cleaner"]

    @model_validator(mode="after")
    def _has_cleaner_times(self) -> Self:
        if self.within == "cleaner" and self.kind == "grid":
            raise ValueError("a grid may have no time that is cleaner than the student's; use another kind")
        return self

    def __str__(self) -> str:
        return f"{self.within}, {super().__str__()}"

    def capped(self, random: KeyedRandom, t_student: Tensor) -> Tensor:
        """A time for each of the student's times [B]."""
        return self.sample(random, len(t_student), below=t_student if self.within == "cleaner" else 1.0)
