"""Scores, and the ``eval.json`` files that they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fewstep.core.errors import UserError
from fewstep.core.files import reading, write_text
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.metric import Measurement
from fewstep.samplers.generate import GeneratedSet

RESULTS = ("value", "error", "error_of", "bias", "seconds", "manifest")  # fields that are not part of the identity


class Score(BaseModel):
    """One entry of ``eval.json``.

    ``source`` is the path of the images or the model. The hashes identify contents: of the images or the model's
    weights (``source_sha256``), the network's weights (``features_sha256``), the reference, the captions and the
    protocol's settings; None in files of earlier versions, or where there is nothing to hash. ``error``, ``error_of``
    and ``bias`` are those of a ``Measurement``. ``seconds`` is the time for generating the samples; images from a
    folder have no solver. ``manifest`` records the protocol's settings, its networks, versions and notes.
    """

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
    error: float | None = None
    error_of: str | None = None
    bias: float | None = None
    n: int
    seed: int
    seconds: float
    source: str | None = None
    source_sha256: str | None = None
    reference: str
    reference_sha256: str | None = None
    features_sha256: str
    captions_sha256: str | None = None
    protocol: str | None = None
    protocol_sha256: str | None = None
    manifest: dict[str, Any] | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """Everything that determines the value."""
        return tuple(self.model_dump(exclude=set(RESULTS)).values())

    @property
    def sampler(self) -> str:
        """The solver, with the grid of its times unless that is the default; scores on two grids are never pooled."""
        return self.solver if self.grid == "time" else f"{self.solver} on {self.grid}"

    def notes(self) -> list[str]:
        """Remarks on the value for readers."""
        found = list((self.manifest or {}).get("notes", []))
        if self.bias is not None:
            found.append(
                f"{self.metric}: {self.n:,} random real samples would score about {self.bias:.3f}, and not 0, because "
                "they are few."
            )
        if self.error is not None:
            found.append(f"{self.metric}: in brackets, {self.error_of}.")
        return found


SCORES = TypeAdapter(list[Score])


def read_scores(file: Path) -> list[Score]:
    """The scores of an ``eval.json``. Raises ``UserError`` if it cannot be read."""
    with reading(file, "file of scores", "Move it or choose another file."):
        return SCORES.validate_json(file.read_bytes())


def to_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scores as the entries of an ``eval.json``."""
    return [score.model_dump(exclude_none=True) for score in scores]


def write_scores(scores: Sequence[Score], file: Path) -> None:
    """Writes an ``eval.json``. Raises ``UserError`` if it cannot be written or a value is not finite."""
    if bad := [score for score in scores if not math.isfinite(score.value)]:
        raise UserError(f"{bad[0].metric} of {bad[0].model} is {bad[0].value}; such scores are not written to {file}.")
    write_text(json.dumps(to_json(scores), indent=1) + "\n", file)


def merge(old: Sequence[Score], new: Sequence[Score]) -> list[Score]:
    """All scores; a new one replaces only an old one with the same ``identity``: of the same contents, not only of the
    same name."""
    replaced = {score.identity for score in new}
    return [*(score for score in old if score.identity not in replaced), *new]


def scores_of_generated(
    generated: GeneratedSet, measured: Mapping[str, Measurement], hashes: Mapping[str, Mapping[str, str | None]],
    **fields: Any,
) -> list[Score]:  # fmt: skip
    """One score per metric of a model's images; ``hashes`` holds the fields that differ between metrics."""
    sampling, model = generated.config, generated.model
    few_step = model.config.few_step
    return [
        Score(
            role="student" if few_step else "teacher",
            solver=sampling.solver or ("student" if few_step else "euler"), grid=sampling.grid,
            nfe=generated.nfe, steps=sampling.steps or (len(few_step.times) if few_step else 0),
            guidance=sampling.guidance, seed=sampling.seed, seconds=round(generated.seconds, 2), metric=metric,
            **measurement._asdict(), **hashes[metric], **fields,
        )
        for metric, measurement in measured.items()
    ]  # fmt: skip


def scores_of_images(
    images: ImageSet, measured: Mapping[str, Measurement], hashes: Mapping[str, Mapping[str, str | None]], *,
    manifest: dict[str, Any], **fields: Any,
) -> list[Score]:  # fmt: skip
    """One score per metric of images on disk, after a pass over them."""
    notes = [*manifest.get("notes", []), *images.remarks()]
    counts = {"found": len(images.names), "scored": images.scored_count, "files_left_out": len(images.left_out)}
    manifest = {"images": counts, "skipped": images.done.skipped, **manifest, "notes": notes}
    return [
        Score(
            role="images", solver="", nfe=0, steps=0, guidance=1.0, seed=0, seconds=0.0, metric=metric,
            source=str(images.source), source_sha256=images.sha256, manifest=manifest, **measurement._asdict(),
            **hashes[metric], **fields,
        )
        for metric, measurement in measured.items()
    ]  # fmt: skip
