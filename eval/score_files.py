"""Scores, and the ``eval.json`` files that they are kept in."""

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
    """One entry of ``eval.json``. ``seconds`` is the time for generating the samples; images from a folder have no
    solver. ``manifest`` records what else the value depends on (a protocol's settings, its networks, versions)."""

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
    """The scores of an ``eval.json``. Raises ``UserError`` if it cannot be read."""
    try:
        return SCORES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{file} is not a readable file of scores; move it or choose another file.") from error


def write_scores(scores: Sequence[Score], file: Path) -> None:
    """Writes an ``eval.json``. Raises ``UserError`` if it cannot be written."""
    write_text(json.dumps([score.model_dump(exclude_none=True) for score in scores], indent=1) + "\n", file)


def merge(old: Sequence[Score], new: Sequence[Score]) -> list[Score]:
    """All scores; a new one replaces an old one of the same setting, seed, metric and reference."""
    replaced = {_identity(score) for score in new}
    return [*(score for score in old if _identity(score) not in replaced), *new]


def _identity(score: Score) -> tuple[object, ...]:
    return tuple(score.model_dump(exclude={"value", "seconds", "manifest"}).values())


def scores_of_generated(
    generated: GeneratedSet, values: Mapping[str, float], *, sha256: Mapping[str, str], manifest: dict[str, Any],
    **fields: Any,
) -> list[Score]:  # fmt: skip
    """One score per metric of a model's images; ``sha256`` gives the hash of the weights that each metric uses."""
    sampling, few_step = generated.config, generated.model.config.few_step
    role: Literal["teacher", "student"] = "student" if few_step else "teacher"
    return [
        Score(
            role=role, solver=sampling.solver or ("student" if few_step else "euler"), grid=sampling.grid,
            nfe=generated.nfe, steps=sampling.steps or (len(few_step.times) if few_step else 0),
            guidance=sampling.guidance, seed=sampling.seed,
            seconds=round(generated.seconds, 2), metric=metric, value=value, features_sha256=sha256[metric],
            manifest=manifest or None, **fields,
        )
        for metric, value in values.items()
    ]  # fmt: skip


def scores_of_images(
    images: ImageSet, values: Mapping[str, float], *, sha256: Mapping[str, str], manifest: dict[str, Any],
    **fields: Any,
) -> list[Score]:  # fmt: skip
    """One score per metric of images on disk."""
    manifest = {"images": str(images.source), "skipped": images.skipped, **manifest}
    return [
        Score(
            role="images", solver="", nfe=0, steps=0, guidance=1.0, seed=0, seconds=0.0, metric=metric, value=value,
            features_sha256=sha256[metric], manifest=manifest, **fields,
        )
        for metric, value in values.items()
    ]  # fmt: skip
