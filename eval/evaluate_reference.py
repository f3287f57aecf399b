"""Scores by an embedded reference: every metric of its classifier's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.diversity import cross_seed_diversity
from fewstep.eval.metrics.frechet import Statistics, bias_note, frechet_distance
from fewstep.eval.metrics.kid import kid
from fewstep.eval.metrics.precision_recall import precision_recall
from fewstep.eval.networks.features import extract
from fewstep.eval.references import Reference
from fewstep.eval.score_files import Score, scores_of_generated, scores_of_images
from fewstep.eval.toy_captions import CaptionSet, following, read
from fewstep.models.loading import Model
from fewstep.samplers.generate import GeneratedSet, Progress
from fewstep.samplers.plan import SamplingConfig

DIVERSITY_SEEDS = 50  # seeds a class for the diversity metric; its cost is quadratic in them


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
class ReferenceEvaluator:
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
    def hashes(self) -> set[str]:
        return {self.reference.network.sha256}

    def check(self, model: Model) -> None:
        """Raises ``UserError`` on a model whose samples it cannot score, before any is drawn."""
        least = 2 * (model.config.classes or len(CaptionSet.every()))
        if self.n < least:
            raise UserError(f"n must be at least {least} (two samples a class or caption), got {self.n}.")
        if model.config.classes:
            self.reference.network(torch.zeros(1, *model.config.shape, dtype=torch.uint8))

    def __call__(
        self, model: Model, name: str, sampling: SamplingConfig, progress: Progress | None = None
    ) -> list[Score]:
        """Draws the samples and returns one score a metric. Raises ``UserError`` on a request that cannot be met."""
        every = CaptionSet.every()
        classes = model.config.classes
        generated = GeneratedSet(
            model, sampling, self.n, () if classes else every.captions, batch=100, progress=progress
        )
        pictures = torch.cat(list(generated.parts()))
        if classes:
            values = metrics_of_conditions(self.reference, pictures, model.labels(self.n), classes)
        else:
            asked = every.rows(torch.arange(self.n) % len(every))
            values = metrics_of_conditions(self.reference, read(pictures).grey, asked.labels, len(every))
            values |= following(self.reference.network, pictures, asked)
        return scores_of_generated(generated, values, model=name, **self._about(values, self.n))

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Of images on disk, all or ``n`` if there are more; of grey ones the first channel is looked at."""
        images = ImageSet.open(source, skip_bad=self.skip_bad, most=self.n)
        network = self.reference.network
        batches = images.batches(lambda image: image[: network.shape[0]])
        features = torch.cat([network(torch.stack(batch)).cpu() for batch in batches if batch])
        values = metrics(self.reference, features)
        return scores_of_images(images, values, model=name, **self._about(values, len(features)))

    def _about(self, values: Mapping[str, float], count: int) -> dict[str, Any]:
        name = self.reference.metric
        note = bias_note(name, values[name], count, self.reference.statistics)
        return {
            "n": count,
            "reference": f"{self.reference.name}/{self.reference.split}",
            "protocol": self.protocol,
            "sha256": dict.fromkeys(values, self.reference.network.sha256),
            "manifest": {"notes": [note]} if note else {},
        }
