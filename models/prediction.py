"""One network output, converted to x0, noise, v, velocity or score.

Each kind is a row ``(a, b)``, meaning ``a x0 + b noise``. With ``x_t = alpha x0 + sigma noise`` this gives two
equations in two unknowns, so that every conversion is the same 2x2 solve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from torch import Tensor

from fewstep.core.transfer import like
from fewstep.models.schedules import NoiseSchedule

Kind = Literal["x0", "noise", "v", "velocity", "score"]
KINDS: tuple[Kind, ...] = ("x0", "noise", "v", "velocity", "score")
Number = TypeVar("Number", Tensor, float)


def row(kind: Kind, alpha: Number, sigma: Number, d_alpha: Number, d_sigma: Number) -> tuple[Number, Number]:
    """``(a, b)`` such that the quantity is ``a x0 + b noise``."""
    zero = 0 * alpha
    match kind:
        case "x0":
            return zero + 1, zero
        case "noise":
            return zero, zero + 1
        case "v":
            return -sigma, alpha
        case "velocity":
            return d_alpha, d_sigma
        case "score":
            return zero, -1 / sigma


def conversion(
    source: Kind, target: Kind, alpha: Number, sigma: Number, d_alpha: Number, d_sigma: Number
) -> tuple[Number, Number]:
    """``(p, q)`` such that ``target = p x_t + q source``; exactly (0, 1) where the two are the same."""
    if source == target:
        return 0 * alpha, 0 * alpha + 1
    a, b = row(source, alpha, sigma, d_alpha, d_sigma)
    c, d = row(target, alpha, sigma, d_alpha, d_sigma)
    determinant = alpha * b - sigma * a
    return (c * b - d * a) / determinant, (d * alpha - c * sigma) / determinant


@dataclass(frozen=True)
class Coefficients:
    """The schedule at the times of a batch: float64, broadcastable against ``x_t``."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    _sent: dict[tuple[Kind, Kind], tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def at(schedule: NoiseSchedule, t: Tensor) -> Coefficients:
        return Coefficients(schedule.alpha(t), schedule.sigma(t), schedule.d_alpha(t), schedule.d_sigma(t))

    def row(self, kind: Kind) -> tuple[Tensor, Tensor]:
        """``(a, b)`` such that the quantity is ``a x0 + b noise``."""
        return row(kind, self.alpha, self.sigma, self.d_alpha, self.d_sigma)

    def convert(self, source: Kind, target: Kind) -> tuple[Tensor, Tensor]:
        """``(p, q)`` such that ``target = p x_t + q source``; exactly (0, 1) where the two are the same."""
        return conversion(source, target, self.alpha, self.sigma, self.d_alpha, self.d_sigma)

    def convert_like(self, x: Tensor, source: Kind, target: Kind) -> tuple[Tensor, ...]:
        """The same as numbers of the type and device of ``x``, copied there once."""
        known = self._sent.get((source, target))
        if known is None or (known[0].dtype, known[0].device) != (x.dtype, x.device):
            known = self._sent[source, target] = like(x, *self.convert(source, target))
        return known


@dataclass(frozen=True)
class Prediction:
    """A network's output ``raw`` (float32, the shape of ``x_t``) of kind ``kind`` at ``x_t``, and its conversions.

    A conversion is ``inf`` or ``nan`` where the quantity is undefined: the score at ``sigma = 0``, ``x0`` from a noise
    prediction at ``alpha = 0``. ``features`` are the outputs of the feature layers, by module path.
    """

    raw: Tensor
    kind: Kind
    x_t: Tensor
    coefficients: Coefficients
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def view(self, kind: Kind) -> Tensor:
        if kind == self.kind:
            return self.raw
        p, q = self.coefficients.convert_like(self.raw, self.kind, kind)
        return p * self.x_t + q * self.raw

    @property
    def x0(self) -> Tensor:
        return self.view("x0")

    @property
    def noise(self) -> Tensor:
        return self.view("noise")

    @property
    def v(self) -> Tensor:
        return self.view("v")

    @property
    def velocity(self) -> Tensor:
        return self.view("velocity")

    @property
    def score(self) -> Tensor:
        return self.view("score")

    def with_raw(self, raw: Tensor) -> Prediction:
        """Another output at the same ``x_t`` and ``t``, as guidance needs; all conversions are affine in it."""
        return replace(self, raw=raw)

    def split(self, size: int) -> tuple[Prediction, ...]:
        """Splits a batched prediction, as of several conditions, into parts of ``size`` samples each."""
        parts = range(0, self.raw.shape[0], size)

        def cut(tensor: Tensor, start: int) -> Tensor:
            return tensor if tensor.ndim == 0 or tensor.shape[0] == 1 else tensor[start : start + size]

        c = self.coefficients
        return tuple(
            Prediction(
                cut(self.raw, i),
                self.kind,
                cut(self.x_t, i),
                Coefficients(cut(c.alpha, i), cut(c.sigma, i), cut(c.d_alpha, i), cut(c.d_sigma, i)),
                {name: cut(feature, i) for name, feature in self.features.items()},
            )
            for i in parts
        )
