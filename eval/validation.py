"""Validation during training: images from fixed noise, and the distance to statistics of *training* images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.image_files import to_bytes
from fewstep.core.image_grid import image_grid, save_image
from fewstep.eval.emoji import in_turn
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.references import Reference
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import Vocabulary, WordPrompts
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig

SHOWN_IMAGES, ROWS = 80, 8
SEED = 1_000_000_007  # unlike seeds that people choose, so that validation and evaluation never share noise


@dataclass(frozen=True)
class Validation:
    """Writes a grid of images of a student that takes class labels, or nothing, or the words of the reference's
    captions, to ``samples/`` and returns its Fréchet distance.

    The trainer calls it with the student's averaged weights.
    """

    sampling: SamplingConfig
    n: int
    reference: Reference
    folder: Path

    def small(self, folder: Path) -> Validation:
        """The same with few images, which are written to ``folder``."""
        return replace(self, n=min(self.n, 10), folder=folder)

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> float:
        model = Model(denoiser=student, config=config, path=self.folder)
        condition = model.labels(self.n) if config.vocabulary is None else self._words(config.vocabulary)
        samples = generate(model, condition, replace(self.sampling, seed=SEED), numbers=range(self.n))
        images = to_bytes(samples.x0)
        rows = config.classes or ROWS
        columns = max(1, SHOWN_IMAGES // rows)
        shown = images[:SHOWN_IMAGES]
        if images.ndim == 5:  # each clip becomes a row of frames
            columns, shown = images.shape[2], images[:ROWS].transpose(1, 2).flatten(0, 1)
        if config.classes:
            labels = model.labels(self.n)
            shown = torch.cat([images[labels == label][:columns] for label in range(rows)])
        save_image(image_grid(shown, columns=columns), self.folder / "samples" / f"step-{step:07d}.png")
        features = self.reference.extract(images)
        return frechet_distance(Statistics.of(features), self.reference.statistics)

    def _words(self, vocabulary: Vocabulary) -> Condition:
        """The captions of the reference in turn; ``Reference.require_fit`` has checked that it has some."""
        assert self.reference.captions is not None
        return vocabulary.encode(in_turn(self.reference.captions, self.n).texts)(torch.arange(self.n))


@dataclass(frozen=True)
class PromptValidation:
    """Writes a grid of images of a student that takes prompts, spread evenly over all ``prompts``; there is no score.
    ``decode`` turns samples into images or videos."""

    sampling: SamplingConfig
    images: int
    decode: Callable[[Tensor], Tensor]
    prompts: EncodedPrompts | WordPrompts
    folder: Path

    def small(self, folder: Path) -> PromptValidation:
        """The same with one image, which is written to ``folder``."""
        return replace(self, images=1, folder=folder)

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> None:
        model = Model(denoiser=student, config=config, path=self.folder)
        count = min(self.images, len(self.prompts))
        numbers = [k * len(self.prompts) // count for k in range(count)]
        condition = self.prompts(torch.tensor(numbers)).to(model.device)
        samples = generate(model, condition, replace(self.sampling, seed=SEED), numbers=numbers, batch=4)
        images = self.decode(samples.x0)
        columns = len(numbers)
        if images.ndim == 5:  # each video becomes a row of frames
            columns = images.shape[1]
            images = images.flatten(0, 1)
        save_image(image_grid(images, columns=columns, scale=1), self.folder / "samples" / f"step-{step:07d}.png")
