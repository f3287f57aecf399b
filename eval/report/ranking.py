"""Which of several scores is the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, get_args

from fewstep.core.errors import UserError
from fewstep.eval.evaluate_reference import reference_direction
from fewstep.eval.metrics.metric import Direction
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.score_files import Score

S = TypeVar("S", bound=Score)


def direction_of(score: Score) -> Direction | None:
    """Whether lower or higher values of its metric are better, as the metric declares; None if that is unknown."""
    recorded = (score.manifest or {}).get("directions")
    if isinstance(recorded, dict) and recorded.get(score.metric) in get_args(Direction):
        return recorded[score.metric]  # type: ignore[no-any-return]
    if direction := reference_direction(score.metric):
        return direction
    try:
        return METRICS.resolve(score.metric, from_file=True).direction
    except UserError:
        return None


def best_of(scores: Sequence[S], direction: Direction) -> S:
    """The best of some scores of one metric, the first if several are equal."""
    return (min if direction == "lower" else max)(scores, key=lambda score: score.value)
