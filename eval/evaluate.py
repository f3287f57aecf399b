"""Scores a model on a reference: draws samples, takes their features, and applies every metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fewstep.distill.data import to_bytes
from fewstep.errors import UserError
from fewstep.eval.diversity import cross_seed_diversity
from fewstep.eval.features import extract
from fewstep.eval.frechet import Statistics, frechet_distance
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
    """One line of ``eval.json``. ``seconds`` is the time that the samples took."""

    model_config = ConfigDict(frozen=True)
    model: str
    role: Literal["teacher", "student"]
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
    return tuple(score.model_dump(exclude={"value", "seconds"}).values())


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


def metrics(reference: Reference, images: Tensor, labels: Tensor, conditions: int) -> dict[str, float]:
    """All metrics of images, uint8 [N, C, H, W], that show ``labels`` [N] and were drawn for ``conditions`` in turn."""
    features = extract(reference.network, images)
    right = reference.network.classes(features) == labels
    precision, recall = precision_recall(reference.features, features)
    each = min(len(images) // conditions, DIVERSITY_SEEDS)
    seeds = features[: conditions * each].reshape(each, conditions, -1)
    return {
        reference.metric: frechet_distance(Statistics.of(features), reference.statistics),
        "kid": kid(reference.features, features),
        "precision": precision,
        "recall": recall,
        "accuracy": right.float().mean().item(),
        "diversity": cross_seed_diversity(seeds),
    }


def evaluate(
    model: Model,
    reference: Reference,
    *,
    name: str,
    solver: str,
    steps: int | None,
    guidance: float = 1.0,
    grid: str = "time",
    n: int = 10_000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Draws ``n`` samples and returns one score a metric. Raises ``UserError`` on a request that cannot be met.

    A text-conditioned model is asked for tinted garments (``eval/tinted.py``), every caption in turn: its scores are
    those of the grey garments read back from its pictures, and how often they show what was asked for.
    """
    started = time.monotonic()
    if model.config.classes:
        labels = cycled_labels(n, model.config.classes)
        samples = draw(
            model, labels, solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed, progress=progress
        )
        seconds = time.monotonic() - started
        values = metrics(reference, to_bytes(samples.x0), labels, model.config.classes)
    else:
        every, folder = Asked.every(), pipeline_of(model)
        rows, captions = torch.arange(n) % len(every), every.captions
        pipeline = folder.pipeline().to(model.device)
        condition = folder.condition(pipeline, captions).index(rows.to(model.device))
        samples = draw_from(
            model, condition, range(n), solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed,
            progress=progress,
        )  # fmt: skip
        pictures, asked = folder.pictures(pipeline, samples.x0, batch=100), every.rows(rows)
        seconds = time.monotonic() - started
        values = metrics(reference, read(pictures).grey, asked.labels, len(every))
        values |= following(reference.network, pictures, asked)
    few = model.config.few_step
    used = steps or (len(few.times) if few else 0)
    return [
        Score(
            model=name, role="student" if few else "teacher", solver=solver, grid=grid, nfe=samples.nfe,
            steps=used, guidance=guidance, metric=metric, value=value, n=n, seed=seed,
            seconds=round(seconds, 2), reference=f"{reference.name}/{reference.split}",
            features_sha256=reference.network.sha256,
        )
        for metric, value in values.items()
    ]  # fmt: skip
