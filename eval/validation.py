"""Validation during training: pictures from fixed noise, and the distance from *training*-image statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.distill.config import ValidationConfig
from fewstep.eval.draw import How, draw, draw_from
from fewstep.eval.features import extract
from fewstep.eval.frechet import Statistics, frechet_distance
from fewstep.eval.pictures import grid, save_picture
from fewstep.eval.references import Reference
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.store import Model, ModelConfig
from fewstep.pictures import to_bytes

SHOWN = 80
SEED = 1_000_000_007  # far from the seeds that people give, so that validation noise is never evaluation noise


@dataclass(frozen=True)
class Validation:
    """Called by the run with its student (averaged weights in place); writes ``samples/`` and returns the distance."""

    settings: ValidationConfig
    reference: Reference
    folder: Path

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> float:
        model = Model(denoiser=student, config=config, path=self.folder)
        s = self.settings
        labels = model.labels(s.n)
        samples = draw(model, labels, How(s.solver, s.steps, s.guidance, seed=SEED))
        images = to_bytes(samples.x0)
        columns = max(1, SHOWN // config.classes)
        shown = torch.cat([images[labels == label][:columns] for label in range(config.classes)])
        save_picture(grid(shown, columns=columns), self.folder / "samples" / f"step-{step:07d}.png")
        features = extract(self.reference.network, images)
        return frechet_distance(Statistics.of(features), self.reference.statistics)


@dataclass(frozen=True)
class PromptValidation:
    """The same for a pipeline's student: pictures of prompts spread over all, one noise each, and no score."""

    settings: ValidationConfig
    pipeline: PipelineFolder
    prompts: EncodedPrompts
    folder: Path

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> None:
        model = Model(denoiser=student, config=config, path=self.folder)
        s = self.settings
        count = min(s.pictures, len(self.prompts))
        numbers = [k * len(self.prompts) // count for k in range(count)]
        condition = self.prompts(torch.tensor(numbers)).to(model.device)
        samples = draw_from(model, condition, numbers, How(s.solver, s.steps, s.guidance, seed=SEED), batch=4)
        pictures = self.pipeline.pictures(self.pipeline.pipeline(), samples.x0)
        if pictures.ndim == 5:
            pictures = pictures.flatten(0, 1)  # a video is a row of frames
        columns = len(pictures) // len(numbers) if samples.x0.ndim == 5 else len(numbers)
        save_picture(grid(pictures, columns=columns, scale=1), self.folder / "samples" / f"step-{step:07d}.png")
