"""Scores of a model, or of images, by an embedded reference: samples, their features, and every metric of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fewstep.distill.data import to_bytes
from fewstep.errors import UserError
from fewstep.eval.diversity import cross_seed_diversity
from fewstep.eval.features import extract
from fewstep.eval.frechet import Statistics, bias_note, frechet_distance
from fewstep.eval.images import ImageSet
from fewstep.eval.kid import kid
from fewstep.eval.precision_recall import precision_recall
from fewstep.eval.references import Reference
from fewstep.eval.tinted import Asked, following, read
from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.store import Model, pipeline_of
from fewstep.samplers.sample import Samples, plan, sample

DIVERSITY_SEEDS = 50  # seeds a class for the diversity metric; its cost is quadratic in them


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


def merged(old: list[Score], new: list[Score]) -> list[Score]:
    """All scores, where a new one takes the place of an old one of the same setting, seed, metric and reference."""
    replaced = {_identity(score) for score in new}
    return [score for score in old if _identity(score) not in replaced] + new


def _identity(score: Score) -> tuple[object, ...]:
    return tuple(score.model_dump(exclude={"value", "seconds", "manifest"}).values())


def cycled_labels(n: int, classes: int) -> Tensor:
    """``0, 1, ..., classes - 1, 0, ...``: every class equally often, as in the reference."""
    return torch.arange(n) % classes


def draw(
    model: Model, labels: Tensor, *, solver: str, steps: int | None, guidance: float, seed: int,
    grid: str = "time", first: int = 0, progress: Callable[[int], None] | None = None,
) -> Samples:  # fmt: skip
    """One sample for each label [N], numbered from ``first``; raises ``UserError`` as ``plan`` does."""
    condition = Condition.of_labels(labels, model.config.classes)
    return draw_from(
        model, condition, range(first, first + len(labels)), solver=solver, steps=steps, guidance=guidance, seed=seed,
        grid=grid, progress=progress,
    )  # fmt: skip


def draw_from(
    model: Model, condition: Condition, numbers: Sequence[int], *, solver: str, steps: int | None, guidance: float,
    seed: int, grid: str = "time", batch: int = 100, progress: Callable[[int], None] | None = None,
) -> Samples:  # fmt: skip
    """One sample for each row of ``condition`` [n] and its number; raises ``UserError`` as ``plan`` does."""
    n = len(numbers)
    rule, times = plan(solver, steps, model.config, grid, model.path, guidance)
    if model.config.few_step and model.config.few_step.counts:
        condition = condition.replace(steps=torch.full((n,), len(times) - 1))
    return sample(
        model.denoiser, condition, model.config.shape, n, rule=rule, times=times, guidance=Guidance(guidance),
        seed=seed, numbers=numbers, batch=batch, device=model.device, progress=progress,
    )  # fmt: skip


def metrics(reference: Reference, features: Tensor) -> dict[str, float]:
    """What an embedded reference says of images by their features [N, D]."""
    precision, recall = precision_recall(reference.features, features)
    return {
        reference.metric: frechet_distance(Statistics.of(features), reference.statistics),
        "kid": kid(reference.features, features),
        "precision": precision,
        "recall": recall,
    }


def metrics_of_conditions(reference: Reference, images: Tensor, labels: Tensor, conditions: int) -> dict[str, float]:
    """The same of images, uint8 [N, C, H, W], that show ``labels`` [N] and were drawn for ``conditions`` in turn; and
    how often they show them, and how much those of one condition differ."""
    features = extract(reference.network, images)
    right = reference.network.classes(features) == labels
    each = min(len(images) // conditions, DIVERSITY_SEEDS)
    seeds = features[: conditions * each].reshape(each, conditions, -1)
    return metrics(reference, features) | {
        "accuracy": right.float().mean().item(),
        "diversity": cross_seed_diversity(seeds),
    }


@dataclass(frozen=True)
class ByReference:
    """Scores by an embedded reference: ``n`` samples of each of ``seeds`` against its test images.

    A text-conditioned model is asked for tinted garments (``eval/tinted.py``), every caption in turn: its scores are
    those of the grey garments read back from its pictures, and how often they show what was asked for.
    """

    reference: Reference
    n: int
    seeds: tuple[int, ...]
    protocol: str | None = None
    skip_bad: bool = False

    @property
    def network_sha256(self) -> str:
        return self.reference.network.sha256

    def check(self, model: Model) -> None:
        """Raises ``UserError`` on a model whose samples it cannot score, before any is drawn."""
        least = 2 * (model.config.classes or len(Asked.every()))
        if self.n < least:
            raise UserError(f"n must be at least {least} (two samples a class or caption), got {self.n}.")
        if model.config.classes:
            self.reference.network(torch.zeros(1, *model.config.shape, dtype=torch.uint8))

    def __call__(
        self, model: Model, *, name: str, solver: str, steps: int | None, guidance: float, grid: str, seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """Draws the samples and returns one score a metric. Raises ``UserError`` on a request that cannot be met."""
        started = time.monotonic()
        if model.config.classes:
            labels = cycled_labels(self.n, model.config.classes)
            samples = draw(
                model, labels, solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed, progress=progress
            )
            seconds = time.monotonic() - started
            values = metrics_of_conditions(self.reference, to_bytes(samples.x0), labels, model.config.classes)
        else:
            every, folder = Asked.every(), pipeline_of(model)
            rows, captions = torch.arange(self.n) % len(every), every.captions
            pipeline = folder.pipeline().to(model.device)
            condition = folder.condition(pipeline, captions).index(rows.to(model.device))
            samples = draw_from(
                model, condition, range(self.n), solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed,
                progress=progress,
            )  # fmt: skip
            pictures, asked = folder.pictures(pipeline, samples.x0, batch=100), every.rows(rows)
            seconds = time.monotonic() - started
            values = metrics_of_conditions(self.reference, read(pictures).grey, asked.labels, len(every))
            values |= following(self.reference.network, pictures, asked)
        return scores_of_model(
            model, values, name=name, solver=solver, grid=grid, nfe=samples.nfe, steps=steps, guidance=guidance,
            n=self.n, seed=seed, seconds=seconds, reference=f"{self.reference.name}/{self.reference.split}",
            sha256=dict.fromkeys(values, self.network_sha256), protocol=self.protocol,
            manifest=self._notes(values, self.n),
        )  # fmt: skip

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Of images on disk, all or ``n`` if there are more; of grey ones the first channel is looked at."""
        images = ImageSet.open(source, skip_bad=self.skip_bad, most=self.n)
        network = self.reference.network
        batches = images.batches(lambda image: image[: network.shape[0]])
        features = torch.cat([network(torch.stack(batch)).cpu() for batch in batches])
        values = metrics(self.reference, features)
        return scores_of_images(
            values, name=name, n=len(features), reference=f"{self.reference.name}/{self.reference.split}",
            sha256=dict.fromkeys(values, self.network_sha256), protocol=self.protocol,
            manifest={"images": str(source), "skipped": images.skipped} | self._notes(values, len(features)),
        )  # fmt: skip

    def _notes(self, values: Mapping[str, float], count: int) -> dict[str, Any]:
        name = self.reference.metric
        note = bias_note(name, values[name], count, self.reference.statistics)
        return {"notes": [note]} if note else {}


def scores_of_model(
    model: Model, values: Mapping[str, float], *, name: str, steps: int | None, seconds: float,
    sha256: Mapping[str, str], **settings: Any,
) -> list[Score]:  # fmt: skip
    """A score a metric; ``sha256`` of the weights behind each."""
    few = model.config.few_step
    used = steps or (len(few.times) if few else 0)
    return [
        Score(
            model=name, role="student" if few else "teacher", steps=used, metric=metric, value=value,
            seconds=round(seconds, 2), features_sha256=sha256[metric], **settings,
        )
        for metric, value in values.items()
    ]  # fmt: skip


def scores_of_images(
    values: Mapping[str, float], *, name: str, sha256: Mapping[str, str], **settings: Any
) -> list[Score]:
    """The same of images that no model here drew."""
    return [
        Score(
            model=name, role="images", solver="", nfe=0, steps=0, guidance=1.0, seed=0, seconds=0.0, metric=metric,
            value=value, features_sha256=sha256[metric], **settings,
        )
        for metric, value in values.items()
    ]  # fmt: skip
