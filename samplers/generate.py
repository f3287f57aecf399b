"""Generating samples and images from a model, for training, health checks, evaluation and reports.

The noise of a sample is a function of (seed, number of the sample), so a sample does not depend on its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.image_files import to_images
from fewstep.core.keyed_random import KeyedRandom
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import UNGUIDED, Guidance
from fewstep.models.loading import Model, pipeline_of
from fewstep.samplers.frames import sample_frames
from fewstep.samplers.plan import Plan, SamplingConfig, frames_of, plan
from fewstep.samplers.predictor import ModelOutput, Predictor

PART = 500
BATCH, PIPELINE_BATCH = 100, 8  # samples at a time
Progress = Callable[[int], None]  # receives the number of finished samples


class Samples(NamedTuple):
    """Clean samples [N, ...], in the model's range, and the number of network evaluations per sample."""

    x0: Tensor
    nfe: int


class SampleNoise:
    """Noise [N, *shape] for the samples ``numbers``; each call returns fresh noise, a function of seed and number."""

    def __init__(self, seed: int, numbers: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self._random = [KeyedRandom(seed, number, "sample", 0) for number in numbers]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        return torch.stack([random.normal(self._shape) for random in self._random]).to(self._device)


def integrate(
    denoiser: Denoiser, condition: Condition, shape: tuple[int, ...], *, plan: Plan, numbers: Sequence[int],
    guidance: Guidance = UNGUIDED, seed: int = 0, batch: int = 100, device: torch.device | str = "cpu",
    frames: int | None = None, progress: Progress | None = None,
) -> Samples:  # fmt: skip
    """One sample of ``shape`` per row of ``condition``, the k-th with the noise of ``(seed, numbers[k])``. With
    ``frames``, videos of so many frames, generated one after the other; ``nfe`` is then that of each frame.

    Runs in inference mode, which speeds up small networks by a few percent; the result holds ordinary tensors. Raises
    ``UserError`` that names solver and step if a sample is not finite.
    """
    initial_sigma = float(denoiser.schedule.sigma(torch.tensor(plan.times[0], dtype=torch.float64)))
    if frames is not None:
        shape = (shape[0], 1, *shape[2:])  # of each frame
    parts, nfe = [], 0
    for low in range(0, len(numbers), batch):
        rows = slice(low, min(low + batch, len(numbers)))
        noise = partial(SampleNoise, seed, numbers[rows], shape, torch.device(device))
        predict = Predictor(denoiser, condition.index(rows).to(device), guidance)
        part = _solve(predict, initial_sigma, plan, noise(), frames)
        if not part.isfinite().all():
            checked = _CheckedPredictor(denoiser, predict.condition, guidance, plan=plan)
            _solve(checked, initial_sigma, plan, noise(), frames)
            raise not_finite(plan, len(plan.times) - 1, "the state")
        parts.append(part)
        nfe = predict.nfe // (frames or 1)
        if progress is not None:
            progress(rows.stop)
    return Samples(torch.cat(parts), nfe)


def _solve(
    predict: Predictor, initial_sigma: float, plan: Plan, noise: SampleNoise, frames: int | None
) -> Tensor:  # fmt: skip
    def sample() -> Tensor:
        return plan.solver(predict, initial_sigma * noise(), plan.times, noise)

    with torch.no_grad():  # not inference_mode, in which networks that are split over processes cannot be gathered
        return sample().cpu() if frames is None else sample_frames(predict, sample, frames)


@dataclass
class _CheckedPredictor(Predictor):
    """A predictor that raises ``UserError`` where a value is not finite first; used for a run that failed, since the
    check waits for the device."""

    plan: Plan = field(kw_only=True)

    def __call__(self, x: Tensor, t: float) -> ModelOutput:
        step = max(1, sum(t <= each for each in self.plan.times[:-1]))
        if not x.isfinite().all():  # the step before this evaluation made it so
            raise not_finite(self.plan, step - (t in self.plan.times and step > 1), "the state")
        output = super().__call__(x, t)
        if not output.raw.isfinite().all():
            raise not_finite(self.plan, step, "the model's output")
        return output


def not_finite(plan: Plan, step: int, what: str) -> UserError:
    """The error about values that are not finite."""
    t = plan.times[step - 1]
    return UserError(
        f"Sampling with {plan.solver.name or 'this solver'} failed: {what} is not finite in step {step} of "
        f"{len(plan.times) - 1}, which starts at t = {t:g}. Check the model's weights, or try another solver or grid."
    )


def generate(
    model: Model, condition: Condition | Tensor, config: SamplingConfig, *, numbers: Sequence[int] | None = None,
    batch: int = 100, progress: Progress | None = None,
) -> Samples:  # fmt: skip
    """One sample per row of ``condition``, or per class label [N] (any numbers for an unconditional model). ``numbers``
    (by default 0 to N - 1; required with an empty condition) select the noise of each. Raises ``UserError`` as ``plan``
    does."""
    if isinstance(condition, Tensor):
        numbers = range(len(condition)) if numbers is None else numbers
        condition = Condition.of_labels(condition, model.config.classes)
    numbers = range(len(next(iter(condition.values())))) if numbers is None else numbers
    sampling_plan = plan(model, config)
    if model.config.few_step and model.config.few_step.counts:
        condition = condition.replace(steps=torch.full((len(numbers),), len(sampling_plan.times) - 1))
    return integrate(
        model.denoiser, condition, model.config.shape, plan=sampling_plan, numbers=numbers,
        guidance=Guidance(config.guidance), seed=config.seed, batch=batch, device=model.device,
        frames=frames_of(model, config), progress=progress,
    )  # fmt: skip


class ImageGenerator:
    """Generates images, uint8 [N, C, H, W] (or videos [N, F, C, H, W]), of a model's classes or of the given prompts;
    of an unconditional model, as of one class. Prompts are encoded on use, so memory does not grow with their number.
    """

    def __init__(
        self, model: Model, prompts: Sequence[str] = (), batch: int | None = None, pipeline: Any = None
    ) -> None:
        """``batch`` samples at a time, by default 8 of a pipeline and 100 of another model; ``pipeline`` holds text
        encoders and VAE that are loaded already. Raises ``UserError`` on prompts for a class-conditional model, on
        missing prompts for a text-conditioned one, and on a pipeline that cannot encode them."""
        self._batch = batch or (PIPELINE_BATCH if prompts and model.config.vocabulary is None else BATCH)
        self.model, self.nfe = model, 0  # network evaluations per image in the last call
        self._encode: Callable[[Tensor], Condition]
        self._to_images: Callable[[Tensor], Tensor] = to_images
        if prompts and model.config.vocabulary is not None:
            self.conditions = len(prompts)
            self._encode = model.config.vocabulary.encode(prompts)
        elif prompts:
            folder = pipeline_of(model)
            pipeline = folder.pipeline().to(model.device) if pipeline is None else pipeline
            self.conditions = len(prompts)
            self._encode = lambda rows: folder.condition(pipeline, [prompts[k] for k in rows.tolist()])
            self._to_images = partial(folder.decode_images, pipeline, batch=self._batch)
        else:
            self.conditions = len(model.labels(max(1, model.config.classes)))
            self._encode = lambda rows: Condition.of_labels(rows, model.config.classes)

    def __call__(
        self, indices: Sequence[int] | Tensor, config: SamplingConfig, numbers: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """One image per condition index in ``indices``; ``numbers`` (by default 0 to N - 1) select the noise of each.
        Raises ``UserError`` as ``plan`` does."""
        unique, inverse = torch.as_tensor(indices).unique(return_inverse=True)
        condition = self._encode(unique).to("cpu").index(inverse)
        numbers = range(len(inverse)) if numbers is None else numbers
        samples = generate(self.model, condition, config, numbers=numbers, batch=self._batch, progress=progress)
        self.nfe = samples.nfe
        return self._to_images(samples.x0)


@dataclass
class GeneratedSet:
    """``n`` images that cycle through a model's conditions, generated in parts so that memory does not grow with ``n``.
    After a pass, ``seconds`` holds the time for generation and ``nfe`` the network evaluations per image."""

    model: Model
    config: SamplingConfig
    n: int
    prompts: Sequence[str] = ()
    batch: int | None = None
    progress: Progress | None = None
    seconds: float = field(default=0.0, init=False)
    nfe: int = field(default=0, init=False)

    def parts(self) -> Iterator[Tensor]:
        """uint8 [N, C, H, W], or videos [N, F, 3, H, W]."""
        start = time.monotonic()
        generator = ImageGenerator(self.model, self.prompts, self.batch)
        for first in range(0, self.n, PART):
            numbers = range(first, min(first + PART, self.n))
            indices = torch.tensor(numbers) % generator.conditions
            images = generator(indices, self.config, numbers, self._progress_from(first))
            self.seconds += time.monotonic() - start
            self.nfe = generator.nfe
            yield images
            start = time.monotonic()

    def _progress_from(self, first: int) -> Progress | None:
        progress = self.progress
        return (lambda done: progress(first + done)) if progress is not None else None
