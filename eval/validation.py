"""Validation during training: pictures from fixed noise, and the distance from *training*-image statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fewstep.core.image_files import to_bytes
from fewstep.core.image_grid import grid, save_picture
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.features import extract
from fewstep.eval.references import Reference
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig

SHOWN = 80
SEED = 1_000_000_007  # far from the seeds that people give, so that validation noise is never evaluation noise


@dataclass(frozen=True)
class Validation:
    """Called by the run with its student (averaged weights in place); writes ``samples/`` and returns the distance."""

    sampling: SamplingConfig
    n: int
    reference: Reference
    folder: Path

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> float:
        model = Model(denoiser=student, config=config, path=self.folder)
        labels = model.labels(self.n)
        samples = generate(model, labels, replace(self.sampling, seed=SEED))
        images = to_bytes(samples.x0)
        columns = max(1, SHOWN // config.classes)
        shown = torch.cat([images[labels == label][:columns] for label in range(config.classes)])
        save_picture(grid(shown, columns=columns), self.folder / "samples" / f"step-{step:07d}.png")
        features = extract(self.reference.network, images)
        return frechet_distance(Statistics.of(features), self.reference.statistics)


@dataclass(frozen=True)
class PromptValidation:
    """The same for a pipeline's student: pictures of prompts spread over all, one noise each, and no score."""

    sampling: SamplingConfig
    images: int
    pipeline: PipelineFolder
    prompts: EncodedPrompts
    folder: Path

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> None:
        model = Model(denoiser=student, config=config, path=self.folder)
        count = min(self.images, len(self.prompts))
        numbers = [k * len(self.prompts) // count for k in range(count)]
        condition = self.prompts(torch.tensor(numbers)).to(model.device)
        samples = generate(model, condition, replace(self.sampling, seed=SEED), numbers=numbers, batch=4)
        pictures = self.pipeline.pictures(self.pipeline.pipeline(), samples.x0)
        if pictures.ndim == 5:
            pictures = pictures.flatten(0, 1)  # a video is a row of frames
        columns = len(pictures) // len(numbers) if samples.x0.ndim == 5 else len(numbers)
        save_picture(grid(pictures, columns=columns, scale=1), self.folder / "samples" / f"step-{step:07d}.png")
