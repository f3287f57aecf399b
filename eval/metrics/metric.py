"""Metrics: numbers computed from the features of a set of images, with what a protocol must know about them.

A metric of your own is a ``Metric`` in your module: give its dotted name (``package.module:METRIC``) in a protocol, or
register a short name with ``fewstep.register("metric", NAME)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import FeatureStatistics
from fewstep.eval.metrics.frechet import Statistics

Direction = Literal["lower", "higher"]
T = TypeVar("T")
NOTED_BIAS = 0.05  # of the value
SEEDS = 50  # of one condition: the cost of a diversity is quadratic in them


class Measurement(NamedTuple):
    """A value; its error bar and what that is; and the value that as many real images would have because they are so
    few, if that is more than ``NOTED_BIAS`` of it."""

    value: float
    error: float | None = None
    error_of: str | None = None
    bias: float | None = None


@dataclass(frozen=True, eq=False)
class MetricInput:
    """What the metrics of one network receive.

    ``texts`` holds the embeddings [M, D] of the captions by the prefix before them. Image k shows class or caption
    ``k % conditions``; ``conditions`` is 0 if that is unknown.
    """

    images: FeatureStatistics
    reference: FeatureStatistics | None
    texts: Mapping[str, Tensor]
    conditions: int
    _shared: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def real(self) -> FeatureStatistics:
        """The reference of a metric with ``needs_reference``."""
        assert self.reference is not None
        return self.reference

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """The features of the real images [N, D] and of these [M, D]."""
        return self.real.features(), self.images.features()

    def shared(self, compute: Callable[[MetricInput], T]) -> T:
        """``compute(self)``, computed once: for metrics that are two results of one computation."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        value: T = self._shared[compute]
        return value

    def features_by_seed(self) -> Tensor:
        """The features as [S, N, D]: S images of each of N conditions. Of one condition all images are seeds, of which
        at most ``SEEDS`` are compared with each other. Raises ``UserError`` if S would be below 2."""
        features = self.images.features()
        columns = max(1, len(features) // SEEDS) if self.conditions == 1 else self.conditions
        seeds = len(features) // columns if columns else 0
        if seeds < 2:
            raise UserError(
                f"{len(features)} images of {self.conditions} conditions: two images per condition are needed."
            )
        return features[: seeds * columns].reshape(seeds, columns, -1)


@dataclass(frozen=True)
class Metric:
    """One number for a set of images.

    Args:
        name: its name in protocols and files of scores.
        network: the network whose features it compares, by its name in ``eval/networks/registry.py`` or a dotted one.
        direction: whether lower or higher values are better.
        minimum_n: the smallest number of images it can be computed from.
        compute: the computation.
        needs_features: needs the features of every image, not only their mean and covariance.
        needs_reference: compares with real images or their statistics.
        caption_prefix: needs captions, with this text before each (the network must be ``clip``); None: needs none.
        per_condition: ``minimum_n`` counts the images of each class or caption.
        videos: is computed from videos, not from images.
        minimum_side: the smallest height and width of its images, in pixels.
        error: the size of an error bar of the value, computed from the same input; None if there are too few images.
        error_of: what the error bar is, for example "standard deviation over 10 splits".
        bias: ``bias(statistics of the reference, n)``, the value that n real images would have.
        needs_real_features: needs the features of every real image, not only their mean and covariance.
        computation: how it is computed, in a few words for tables.
        needs_groups: the error bar needs the moments of each group of the images (``metrics/jackknife.py``).

    Raises ``ValueError`` if these contradict each other.
    """

    name: str
    network: str
    direction: Direction
    minimum_n: int
    compute: Callable[[MetricInput], float]
    needs_features: bool = False
    needs_reference: bool = False
    caption_prefix: str | None = None
    per_condition: bool = False
    videos: bool = False
    minimum_side: int = 1
    error: Callable[[MetricInput], float | None] | None = None
    error_of: str | None = None
    bias: Callable[[Statistics, int], float] | None = None
    needs_groups: bool = False
    needs_real_features: bool = False
    computation: str = ""

    def __post_init__(self) -> None:
        if self.bias is not None and not self.needs_reference:
            raise ValueError(f"{self.name}: a bias needs a reference")
        if self.needs_real_features and not self.needs_reference:
            raise ValueError(f"{self.name}: features of real images need a reference")
        if (self.error is None) != (self.error_of is None):
            raise ValueError(f"{self.name}: an error bar needs both error and error_of")
        if self.caption_prefix is not None and self.network != "clip":
            raise ValueError(f"{self.name}: only the network 'clip' embeds captions, not {self.network!r}")

    @property
    def needs_captions(self) -> bool:
        """Whether its value depends on which caption an image belongs to."""
        return self.caption_prefix is not None or self.per_condition

    def check_count(self, n: int, conditions: int) -> None:
        """Raises ``UserError`` if it cannot be computed from ``n`` images of ``conditions`` classes or captions (0:
        unknown)."""
        if self.per_condition and not conditions:
            raise UserError(f"{self.name} needs captions or classes: it compares the images of each of them.")
        minimum, each = self.minimum_n, ""
        if self.per_condition:
            minimum, each = self.minimum_n * conditions, f", {self.minimum_n} of each class or caption"
        if n < minimum:
            raise UserError(f"{self.name} needs at least {minimum} images{each}, got {n}.")

    def measure(self, inputs: MetricInput) -> Measurement:
        """The value with its error bar and bias. Raises ``UserError`` if they are not finite."""
        value = self.compute(inputs)
        error = self.error(inputs) if self.error else None
        if not all(map(math.isfinite, (value, error or 0.0))):
            raise UserError(
                f"{self.name} is {value} with error bar {error} for these images; no score is written. Check the "
                "images and the reference."
            )
        bias = self.bias(inputs.real.statistics, inputs.images.statistics.count) if self.bias else None
        error_of = self.error_of if error is not None else None
        return Measurement(value, error, error_of, bias if bias and bias > NOTED_BIAS * value else None)
