"""Previews while training: samples of the averaged student below the teacher's, from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.image_files import to_images
from fewstep.core.image_grid import comparison
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import TrainingInputs
from fewstep.distill.callback import Callback
from fewstep.distill.config import Config
from fewstep.distill.stage import guidance_of
from fewstep.distill.trainer import Trainer
from fewstep.models.condition import Condition
from fewstep.models.loading import Model
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig

SIDE, SMALL = 512, 64  # pixels: larger images are shown smaller than they are, and smaller ones larger


@dataclass
class Previews(Callback):
    """Every ``every`` steps and at the end, renders ``n`` samples for the rows of ``condition`` and passes the image to
    the callbacks' ``on_preview``. ``decode`` turns samples [N, ...] into images, uint8 [N, C, H, W], or videos, uint8
    [N, F, C, H, W]. The teacher's are computed once per guidance scale.

    Training is not affected: noise depends on the sample's number alone, and evaluations are not counted.
    """

    every: int
    n: int
    condition: Condition
    decode: Callable[[Tensor], Tensor]
    _teacher: dict[float, tuple[str, Tensor]] = field(default_factory=dict)

    @staticmethod
    def create(config: Config, inputs: TrainingInputs) -> Previews | None:
        """The previews of a run; None if they are off, or not requested and impossible. Raises ``UserError`` if they
        are requested of samples that cannot be shown."""
        wanted = config.previews.every
        every = config.validation.every if wanted is None else wanted
        decode = _decoder(inputs)
        if every and decode is not None:
            n = config.previews.n
            return Previews(every, n, _conditions(inputs, n), decode)
        if wanted:
            shape = list(inputs.model_config.shape)
            raise UserError(
                f"previews.every = {wanted}: samples {shape} are no images or videos with 1 or 3 channels, and there "
                "is no VAE of a pipeline that decodes them. Set previews.every=0."
            )
        return None

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0 or trainer.step == trainer.config.steps:
            trainer.notify_together("on_preview", self.render(trainer))

    def render(self, trainer: Trainer) -> Image:
        """One row of images per model with its name above; in a run without a teacher only the student's."""
        try:
            rows = trainer.evaluate(lambda: self._rows(trainer))
        except UserError as error:
            raise type(error)(f"Previews (the keys under previews:) at step {trainer.step}: {error}") from error
        return comparison(rows, scale=max(1, SMALL // rows[0][1].shape[-1]))

    @torch.no_grad()
    def _rows(self, trainer: Trainer) -> list[tuple[str, Tensor]]:
        guidance = guidance_of(trainer.config.stages[trainer.stage].objective)
        rows = []
        if "teacher" in trainer.inputs.roles:
            if guidance not in self._teacher:
                with trainer.roles.resident("teacher") as teacher:
                    model = Model(denoiser=teacher, config=trainer.inputs.model_config)
                    self._teacher[guidance] = self._row("teacher", model, trainer.config, guidance)
            rows.append(self._teacher[guidance])
        with trainer.roles["student"].averaged():
            rows.append(self._row(f"student at step {trainer.step}", trainer.student, trainer.config, guidance))
        return rows

    def _row(self, name: str, model: Model, config: Config, guidance: float) -> tuple[str, Tensor]:
        """A model with a few-step rule is sampled by it, any other as the teacher is in health checks."""
        few_step = model.config.few_step
        sampling = SamplingConfig() if few_step else SamplingConfig("heun", config.health.teacher_steps, guidance)
        samples = generate(model, self.condition, sampling, numbers=range(self.n), batch=config.batch)
        return f"{name}, {samples.nfe} evaluations", _tiles(self.decode(samples.x0))


def _decoder(inputs: TrainingInputs) -> Callable[[Tensor], Tensor] | None:
    """What turns samples into images or videos; None if they are neither pixels nor a pipeline's latents."""
    if inputs.pipeline is not None:
        pipeline = inputs.pipeline
        if not pipeline.has_component("vae"):
            return None
        return lambda samples: pipeline.decode_images(pipeline.decoder(), samples)
    model = inputs.model_config
    latents = model.takes_prompts and model.vocabulary is None  # a pipeline's
    return to_images if len(model.shape) in (3, 4) and model.shape[0] in (1, 3) and not latents else None


def _conditions(inputs: TrainingInputs, n: int) -> Condition:
    """``n`` prompts or class labels spread over all; of other data what its source returns."""
    if inputs.prompts is not None:
        return inputs.prompts(_spread(n, len(inputs.prompts)))
    condition = inputs.sources["data"](KeyedRandom(0, 0, "previews", 0), n).condition
    classes = inputs.model_config.classes
    return condition.replace(labels=_spread(n, classes)) if classes and "labels" in condition else condition


def _spread(n: int, count: int) -> Tensor:
    """``n`` numbers below ``count``: evenly spaced, or each in turn if there are fewer."""
    return torch.arange(n) * count // n if n < count else torch.arange(n) % count


def _tiles(images: Tensor) -> Tensor:
    """Images [N, C, H, W] of at most ``SIDE`` pixels; of videos [N, F, C, H, W] the first, middle and last frame."""
    if images.ndim == 5:
        last = images.shape[1] - 1
        images = images[:, sorted({0, last // 2, last})].flatten(0, 1)
    larger = max(images.shape[-2:]) / SIDE
    if larger <= 1:
        return images
    size = [max(1, round(side / larger)) for side in images.shape[-2:]]
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
