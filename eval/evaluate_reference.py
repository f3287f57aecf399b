"""Scores by a bundled reference: the metrics of its classifier's features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.clip_scores import clip_features, shown_words, summarise
from fewstep.eval.emoji import caption_scores, edge_strength, in_turn, renders
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.diversity import cross_seed_diversity
from fewstep.eval.metrics.frechet import Statistics, frechet_distance, frechet_error, grouped_moments, small_sample_bias
from fewstep.eval.metrics.jackknife import ERROR_OF
from fewstep.eval.metrics.kid import ERROR_OF as KID_ERROR_OF
from fewstep.eval.metrics.kid import kid_and_deviation
from fewstep.eval.metrics.metric import NOTED_BIAS, SEEDS, Direction, Measurement
from fewstep.eval.metrics.precision_recall import PRECISION_ERROR_OF, precision_error, precision_recall
from fewstep.eval.networks.features import ClassifierFeatures, extract_features
from fewstep.eval.references import DISTANCE_PREFIX, Reference
from fewstep.eval.score_files import Score, scores_of_generated, scores_of_images
from fewstep.eval.toy_captions import SIDE, CaptionSet, prompt_following, read_back
from fewstep.models.emoji import EmojiCaptions
from fewstep.models.emoji_clips import MOTIONS, ClipCaptions, load_animations
from fewstep.models.loading import Model, pipeline_of
from fewstep.samplers.generate import GeneratedSet, Progress
from fewstep.samplers.plan import SamplingConfig

MINIMUM_EMOJI = 10  # samples, of which a covariance and an error are computed
DIRECTIONS: dict[str, Direction] = {
    "kid": "lower", "precision": "higher", "recall": "higher", "accuracy": "higher", "diversity": "higher",
    "garment": "higher", "colour": "higher", "background": "higher", "prompt": "higher", "name": "higher",
    "style": "higher", "motion": "higher", "weakest_motion": "higher",
    "agreement": "higher",
}  # fmt: skip


def reference_direction(metric: str) -> Direction | None:
    """The direction of a score computed here; None for other names."""
    return "lower" if metric.startswith(DISTANCE_PREFIX) else DIRECTIONS.get(metric)


def metrics(reference: Reference, features: Tensor, conditions: int = 0) -> dict[str, Measurement]:
    """The metrics of images by their features [N, D]; image k shows class or caption ``k % conditions``, 0: unknown."""
    precision, recall = precision_recall(reference.features, features)
    distance = frechet_distance(Statistics.of(features), reference.statistics)
    bias = small_sample_bias(reference.statistics, len(features))
    error = frechet_error(grouped_moments(features, conditions), reference.statistics)
    kid, deviation = kid_and_deviation(reference.features, features)
    return {
        reference.metric: Measurement(
            distance, error, ERROR_OF if error is not None else None, bias if bias > NOTED_BIAS * distance else None
        ),
        "kid": Measurement(kid, deviation, KID_ERROR_OF if deviation is not None else None),
        "precision": Measurement(precision, precision_error(precision, len(features)), PRECISION_ERROR_OF),
        "recall": Measurement(recall),
    }


def conditional_metrics(
    reference: Reference, images: Tensor, labels: Tensor | None, conditions: int
) -> dict[str, Measurement]:
    """The metrics of images, uint8 [N, C, H, W], generated for ``conditions`` in turn; how many of them the classifier
    assigns to their ``labels`` [N], if they have some (accuracy); and how much the images of one condition differ
    (diversity)."""
    features = extract_features(reference.network, images)
    values = metrics(reference, features, conditions)
    if labels is not None and isinstance(reference.network, ClassifierFeatures):
        correct = reference.network.classes(features) == labels
        values["accuracy"] = Measurement(correct.float().mean().item())
    columns = conditions if conditions > 1 else max(1, len(images) // SEEDS)  # of one condition all images are seeds
    seeds = min(len(images) // columns, SEEDS)
    by_seed = features[: columns * seeds].reshape(seeds, columns, -1)
    return values | {"diversity": Measurement(cross_seed_diversity(by_seed))}


def emoji_metrics(reference: Reference, images: Tensor, captions: EmojiCaptions) -> dict[str, Measurement]:
    """The metrics of images of emoji, uint8 [N, 3, 32, 32]; how many of them show what their ``captions`` [N] describe;
    and how strong their edges are relative to those of renders of the same captions (sharpness).

    These renders also say what a perfect model would score: less than random images do, as no caption is repeated."""
    network, real = reference.classifier, renders(captions, "scored")
    features = extract_features(network, images)
    values = metrics(reference, features)
    distance = values[reference.metric]
    least = frechet_distance(Statistics.of(extract_features(network, real)), reference.statistics)
    noted = least if least > NOTED_BIAS * distance.value else None
    followed = caption_scores(network, features, images, captions)
    return values | {
        reference.metric: distance._replace(bias=noted),
        **{name: Measurement(value) for name, value in followed.items()},
        "sharpness": Measurement(edge_strength(images) / edge_strength(real)),
    }


def clip_metrics(
    reference: Reference, clips: Tensor, captions: ClipCaptions, conditions: int
) -> dict[str, Measurement]:
    """The metrics of clips of emoji, uint8 [N, 3, 8, 32, 32]; how they follow their ``captions`` [N], of which clip k
    shows number ``k % conditions``, with the lowest share of ``motion`` among the motions (weakest_motion); and how
    much the clips of one caption differ (diversity)."""
    frames = clip_features(reference.network, clips)
    features = summarise(frames)
    values = metrics(reference, features, conditions)
    shown = shown_words(reference.classifier, load_animations().names, clips, frames, captions)
    shares = [shown.pop(f"motion_{motion}") for motion in MOTIONS if f"motion_{motion}" in shown]
    shown["weakest_motion"] = min(shares, key=lambda measured: measured.value)
    seeds = len(clips) // conditions
    by_seed = features[: seeds * conditions].reshape(seeds, conditions, -1)
    return values | shown | {"diversity": Measurement(cross_seed_diversity(by_seed))}


@dataclass(frozen=True)
class ReferenceEvaluator:
    """Scores by a bundled reference: ``n`` samples of each of ``seeds`` against its test images.

    A model that takes words generates emoji for the captions of the reference in turn (``eval/emoji.py``).

    A text-conditioned model generates tinted garments (``eval/toy_captions.py``) for every caption in turn. Its scores
    are those of the grey garments recovered from its images, and how often they show what the caption describes.
    """

    reference: Reference
    n: int
    seeds: tuple[int, ...]
    protocol: str | None = None
    skip_bad: bool = False
    progress: Callable[[str, int], None] | None = None

    @property
    def hashes(self) -> set[str]:
        """SHA-256 of the classifier's weights."""
        return {self.reference.network.sha256}

    def check(self, model: Model) -> None:
        """Raises ``UserError`` on a model whose samples cannot be scored, before any is generated."""
        if model.config.vocabulary is not None:
            self.reference.require_fit(model.config)
            if self.n < MINIMUM_EMOJI:
                raise UserError(f"n must be at least {MINIMUM_EMOJI}, got {self.n}.")
            return
        prompted = model.config.takes_prompts
        minimum = 2 * (len(CaptionSet.all()) if prompted else max(1, model.config.classes))
        if self.n < minimum:
            raise UserError(f"n must be at least {minimum} (two samples per class or caption), got {self.n}.")
        if prompted:
            self._check_garments(model)
            return
        self.reference.require_fit(model.config)

    def _check_garments(self, model: Model) -> None:
        """Raises ``UserError`` unless a pipeline's samples have the shape of tinted garments, and the reference that of
        the grey ones: other pipelines have other captions."""
        height, width = (side * pipeline_of(model).family.factor for side in model.config.shape[-2:])
        if self.reference.classifier.shape != (1, 28, 28) or (height, width) != (SIDE, SIDE):
            raise UserError(
                f"The reference {self.reference.name} cannot score this pipeline: references score models of class "
                "labels, unconditional ones and the bundled fashion-text. Give --protocol, whose reference is a folder "
                "of images."
            )

    def __call__(
        self, model: Model, name: str, sampling: SamplingConfig, progress: Progress | None = None
    ) -> list[Score]:
        """Generates the samples and returns one score per metric. Raises ``UserError`` on invalid requests."""
        captions, classes, prompted = CaptionSet.all(), model.config.classes, model.config.takes_prompts
        rendered = self.reference.captions if model.config.vocabulary is not None else None
        if isinstance(rendered, ClipCaptions):  # two clips of each, which are compared with each other
            rendered = in_turn(rendered, max(1, self.n // 2))
        prompts = rendered.texts if rendered is not None else captions.captions if prompted else ()
        generated = GeneratedSet(model, sampling, self.n, prompts, batch=100, progress=progress)
        images = torch.cat(list(generated.parts()))
        if isinstance(rendered, ClipCaptions):
            values = clip_metrics(self.reference, images.transpose(1, 2), in_turn(rendered, self.n), len(rendered))
        elif rendered is not None:
            values = emoji_metrics(self.reference, images, in_turn(rendered, self.n))
        elif not prompted:
            labels = model.labels(self.n) if classes else None
            values = conditional_metrics(self.reference, images, labels, max(1, classes))
        else:
            shown = captions.select(torch.arange(self.n) % len(captions))
            values = conditional_metrics(self.reference, read_back(images).grey, shown.labels, len(captions))
            followed = prompt_following(self.reference.classifier, images, shown)
            values |= {metric: Measurement(value) for metric, value in followed.items()}
        return scores_of_generated(generated, values, self._hashes(values), model=name, **self._fields())

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Scores of exactly ``n`` images on disk. For a grey reference their first channel is used."""
        images = ImageSet.open(source, skip_bad=self.skip_bad, count=self.n)
        network = self.reference.network
        batches = images.batches(lambda image: image[: network.shape[0]])
        parts = []
        for batch in batches:
            parts += [network(torch.stack(batch)).cpu()] if batch else []
            if self.progress is not None:
                self.progress("images", images.scored_count)
        values = metrics(self.reference, torch.cat(parts))
        return scores_of_images(images, values, self._hashes(values), model=name, **self._fields(), manifest={})

    def _hashes(self, names: Iterable[str]) -> dict[str, dict[str, str | None]]:
        reference = self.reference
        known = {"features_sha256": reference.network.sha256, "reference_sha256": reference.sha256}
        return {name: dict(known) for name in names}

    def _fields(self) -> dict[str, Any]:
        reference = f"{self.reference.name}/{self.reference.split}"
        return {"n": self.n, "reference": reference, "protocol": self.protocol}
