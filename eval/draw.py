"""Samples to look at and to score: of class labels, or of prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.store import Model, pipeline_of
from fewstep.pictures import to_bytes
from fewstep.samplers.sample import Plan, Samples, plan, sample

PART = 500
Told = Callable[[int], None]


class How(NamedTuple):
    """How a model is sampled: what ``plan`` takes, and the seed of the noise."""

    solver: str
    steps: int | None
    guidance: float = 1.0
    grid: str = "time"
    seed: int = 0


def planned(model: Model, how: How) -> Plan:
    """The rule and the times. Raises ``UserError`` on what cannot be, before anything is drawn."""
    return plan(how.solver, how.steps, model.config, how.grid, model.path, how.guidance)


def draw(model: Model, labels: Tensor, how: How, *, first: int = 0, progress: Told | None = None) -> Samples:
    """One sample for each label [N], numbered from ``first``; raises ``UserError`` as ``plan`` does."""
    condition = Condition.of_labels(labels, model.config.classes)
    return draw_from(model, condition, range(first, first + len(labels)), how, progress=progress)


def draw_from(
    model: Model, condition: Condition, numbers: Sequence[int], how: How, *, batch: int = 100,
    progress: Told | None = None,
) -> Samples:  # fmt: skip
    """One sample for each row of ``condition`` [n] and its number; raises ``UserError`` as ``plan`` does."""
    n = len(numbers)
    rule, times = planned(model, how)
    if model.config.few_step and model.config.few_step.counts:
        condition = condition.replace(steps=torch.full((n,), len(times) - 1))
    return sample(
        model.denoiser, condition, model.config.shape, n, rule=rule, times=times, guidance=Guidance(how.guidance),
        seed=how.seed, numbers=numbers, batch=batch, device=model.device, progress=progress,
    )  # fmt: skip


class Painter:
    """Pictures, uint8 [N, C, H, W] (or videos [N, F, 3, H, W]), of a model's conditions: its classes or, if it takes
    prompts, these. Prompts are encoded when they are painted, so that no number of them fills the memory."""

    def __init__(self, model: Model, prompts: Sequence[str] = (), batch: int = 8) -> None:
        """``batch`` is of pipelines. Raises ``UserError`` on prompts for a model of labels and the other way round, and
        on a pipeline that cannot encode them."""
        self.model, self.nfe = model, 0  # of a picture of the last call
        self._encode: Callable[[Tensor], Condition]
        if prompts:
            folder = pipeline_of(model)
            pipeline = folder.pipeline().to(model.device)
            self.conditions, self._batch = len(prompts), batch
            self._encode = lambda rows: folder.condition(pipeline, [prompts[k] for k in rows.tolist()])
            self._shown: Callable[[Tensor], Tensor] = partial(folder.pictures, pipeline, batch=batch)
        else:
            self.conditions, self._batch = len(model.labels(model.config.classes)), 100
            self._encode = lambda rows: Condition.of_labels(rows, self.conditions)
            self._shown = to_bytes

    def __call__(
        self, which: Sequence[int] | Tensor, how: How, numbers: Sequence[int] | None = None,
        progress: Told | None = None,
    ) -> Tensor:  # fmt: skip
        """A picture of each of the conditions ``which``, numbered from 0 or by ``numbers``; raises ``UserError`` as
        ``plan`` does."""
        once, back = torch.as_tensor(which).unique(return_inverse=True)
        condition = self._encode(once).to("cpu").index(back)
        samples = draw_from(
            self.model, condition, range(len(back)) if numbers is None else numbers, how, batch=self._batch,
            progress=progress,
        )  # fmt: skip
        self.nfe = samples.nfe
        return self._shown(samples.x0)


@dataclass
class Drawing:
    """``n`` pictures of a model's conditions in turn, a part at a time so that no number of them fills the memory.
    ``seconds`` and ``nfe`` tell, after a pass, what they took."""

    model: Model
    how: How
    n: int
    prompts: Sequence[str] = ()
    batch: int = 8
    progress: Told | None = None
    seconds: float = field(default=0.0, init=False)
    nfe: int = field(default=0, init=False)

    def parts(self) -> Iterator[Tensor]:
        """uint8 [N, C, H, W], or videos [N, F, 3, H, W]."""
        started = time.monotonic()
        paint = Painter(self.model, self.prompts, self.batch)
        for first in range(0, self.n, PART):
            numbers = range(first, min(first + PART, self.n))
            pictures = paint(torch.tensor(numbers) % paint.conditions, self.how, numbers, self._told(first))
            self.seconds += time.monotonic() - started
            self.nfe = paint.nfe
            yield pictures
            started = time.monotonic()

    def _told(self, first: int) -> Told | None:
        told = self.progress
        return (lambda done: told(first + done)) if told is not None else None
