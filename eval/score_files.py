"""Scores: the lines of an ``eval.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.eval.images import ImageSet
from fewstep.samplers.generate import GeneratedSet


class Score(BaseModel):
    """One line of ``eval.json``. ``seconds`` is the time that the samples took. Images from a folder have no solver;
    ``manifest`` is what else the value depends on (a protocol's settings, its networks, versions)."""

    model_config = ConfigDict(frozen=True)
    model: str
    role: Literal["teacher", "student", "images"]
    solver: str
    grid: str = "time"
    nfe: int
    steps: int
    guidance: float
    metric: str
    value: float
    n: int
    seed: int
    seconds: float
    reference: str
    features_sha256: str
    protocol: str | None = None
    manifest: dict[str, Any] | None = None


SCORES = TypeAdapter(list[Score])


def read_scores(file: Path) -> list[Score]:
    """The scores of an ``eval.json``. Raises ``UserError`` if it is none."""
    try:
        return SCORES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{file} is no readable file of scores; move it away or name another.") from error


def write_scores(scores: Sequence[Score], file: Path) -> None:
    write_text(json.dumps([score.model_dump(exclude_none=True) for score in scores], indent=1) + "\n", file)


def merge(old: Sequence[Score], new: Sequence[Score]) -> list[Score]:
    """All scores, where a new one takes the place of an old one of the same setting, seed, metric and reference."""
    replaced = {_identity(score) for score in new}
    return [*(score for score in old if _identity(score) not in replaced), *new]


def _identity(score: Score) -> tuple[object, ...]:
    return tuple(score.model_dump(exclude={"value", "seconds", "manifest"}).values())


def scores_of_generated(
    generated: GeneratedSet, values: Mapping[str, float], *, sha256: Mapping[str, str], manifest: dict[str, Any],
    **about: Any,
) -> list[Score]:  # fmt: skip
    """A score a metric of a model's pictures; ``sha256`` is that of the weights behind each metric."""
    sampling, few = generated.config, generated.model.config.few_step
    return [
        Score(
            role="student" if few else "teacher", solver=sampling.solver or ("student" if few else "euler"), grid=sampling.grid, nfe=generated.nfe,
            steps=sampling.steps or (len(few.times) if few else 0), guidance=sampling.guidance, seed=sampling.seed,
            seconds=round(generated.seconds, 2), metric=metric, value=value, features_sha256=sha256[metric],
            manifest=manifest or None, **about,
        )
        for metric, value in values.items()
    ]  # fmt: skip


def scores_of_images(
    images: ImageSet, values: Mapping[str, float], *, sha256: Mapping[str, str], manifest: dict[str, Any],
    **about: Any,
) -> list[Score]:  # fmt: skip
    """The same of images that no model here drew."""
    manifest = {"images": str(images.source), "skipped": images.skipped, **manifest}
    return [
        Score(
            role="images", solver="", nfe=0, steps=0, guidance=1.0, seed=0, seconds=0.0, metric=metric, value=value,
            features_sha256=sha256[metric], manifest=manifest, **about,
        )
        for metric, value in values.items()
    ]  # fmt: skip
