"""Scores by a protocol: of images, or of a model, drawn a part at a time so that no number of them fills the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.data import to_bytes
from fewstep.errors import UserError
from fewstep.eval.evaluate import Score, cycled_labels, draw, draw_from, scores_of_images, scores_of_model
from fewstep.eval.images import Drawn
from fewstep.eval.protocol import METRICS, Evaluator
from fewstep.models.store import Model, pipeline_of

PART = 500


@dataclass
class Drawing:
    """A model's images for a protocol: image k shows class or caption k, counted round. ``seconds`` and ``nfe`` tell,
    after a pass, what drawing took."""

    evaluator: Evaluator
    model: Model
    solver: str
    steps: int | None
    guidance: float
    grid: str
    seed: int
    progress: Callable[[int], None] | None = None
    seconds: float = 0.0
    nfe: int = 0

    @property
    def conditions(self) -> int:
        return self.model.config.classes or len(self.evaluator.captions)

    def parts(self) -> Iterator[Tensor]:
        """uint8 [N, C, H, W], or videos [N, F, 3, H, W]."""
        part = self._of_classes if self.model.config.classes else self._of_captions()
        for first in range(0, self.evaluator.protocol.n, PART):
            started = time.monotonic()
            images = part(first, min(PART, self.evaluator.protocol.n - first))
            self.seconds += time.monotonic() - started
            yield images
            if self.progress is not None:
                self.progress(first + len(images))

    def _of_classes(self, first: int, count: int) -> Tensor:
        labels = cycled_labels(first + count, self.model.config.classes)[first:]
        samples = draw(
            self.model, labels, solver=self.solver, steps=self.steps, guidance=self.guidance, seed=self.seed,
            grid=self.grid, first=first,
        )  # fmt: skip
        self.nfe = samples.nfe
        return to_bytes(samples.x0)

    def _of_captions(self) -> Callable[[int, int], Tensor]:
        folder = pipeline_of(self.model)
        pipeline = folder.pipeline().to(self.model.device)
        conditions = folder.condition(pipeline, self.evaluator.captions)

        def part(first: int, count: int) -> Tensor:
            rows = torch.arange(first, first + count, device=self.model.device) % self.conditions
            samples = draw_from(
                self.model, conditions.index(rows), range(first, first + count), solver=self.solver, steps=self.steps,
                guidance=self.guidance, seed=self.seed, grid=self.grid, batch=8,
            )  # fmt: skip
            self.nfe = samples.nfe
            return folder.pictures(pipeline, samples.x0)

        return part


@dataclass(frozen=True)
class ByProtocol:
    """Scores by a protocol, as ``ByReference`` by an embedded reference."""

    evaluator: Evaluator

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.evaluator.protocol.seeds

    @property
    def network_sha256(self) -> str | None:
        return None

    def check(self, model: Model) -> None:
        protocol = self.evaluator.protocol
        if model.config.classes and self.evaluator.captions:
            raise UserError(f"The protocol {protocol.name!r} has captions; this model takes class labels.")
        if not model.config.classes and not self.evaluator.captions:
            raise UserError(f"The protocol {protocol.name!r} has no captions, which this model needs.")

    def __call__(
        self, model: Model, *, name: str, solver: str, steps: int | None, guidance: float, grid: str, seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        drawing = Drawing(self.evaluator, model, solver, steps, guidance, grid, seed, progress)
        values = self.evaluator.score(Drawn(drawing.parts(), self.evaluator.protocol.crop), drawing.conditions)
        return scores_of_model(
            model, values, name=name, solver=solver, grid=grid, nfe=drawing.nfe, steps=steps, guidance=guidance,
            n=self.evaluator.protocol.n, seed=seed, seconds=drawing.seconds,
            **self._about(values, self.evaluator.protocol.n),
        )  # fmt: skip

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Of images on disk, all or the protocol's number if there are more."""
        images = self.evaluator.open(source, most=self.evaluator.protocol.n)
        values = self.evaluator.score(images)
        n = len(images.names) - len(images.skipped)
        about = self._about(values, n)
        about["manifest"] |= {"images": str(source), "skipped": images.skipped}
        return scores_of_images(values, name=name, n=n, **about)

    def _about(self, values: dict[str, float], n: int) -> dict[str, Any]:
        protocol = self.evaluator.protocol
        return {
            "reference": protocol.reference or "",
            "protocol": protocol.name,
            "manifest": self.evaluator.manifest(values, n),
            "sha256": {name: self.evaluator.networks[METRICS[name].network].sha256 for name in protocol.metrics},
        }
