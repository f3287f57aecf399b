"""What a trainer calls: callbacks for its events, and a validator that scores the student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fewstep.distill.loop import LostUpdate
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from fewstep.distill.trainer import Trainer


class Interrupted(Exception):
    """Raised when a signal or ``max_hours`` ended training early; ``folder`` is the run's, if it has one."""

    def __init__(self, text: str, folder: Path | None = None) -> None:
        super().__init__(text)
        self.folder = folder


class Validator(Protocol):
    """Scores the student with its averaged weights: lower is better, None if there is no score."""

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> float | None: ...


class Callback:
    """Receives the events of training. Override the methods you need."""

    def on_note(self, trainer: Trainer, text: str) -> None:
        """Called with a remark for people: training resumes from an older checkpoint, or on another number of
        processes."""

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Called every ``log_every`` steps with losses, gradient norms and diagnostics since the last call."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Called before every step; ``trainer.step`` is the number of those before it."""

    def on_step(self, trainer: Trainer) -> None:
        """Called after every step."""

    def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
        """Called after a step in which an update was not applied, because its gradient was not finite."""

    def on_validation(self, trainer: Trainer, value: float) -> None:
        """Called after a validation with a score; ``trainer.best`` is up to date."""

    def on_preview(self, trainer: Trainer, image: Image) -> None:
        """Called with each preview: samples of the teacher and, below, of the averaged student from the same noise."""

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Called when the state should be saved: regularly, at the end of a stage, and before an interruption; while
        updates are being lost, it is postponed."""

    def on_end(self, trainer: Trainer) -> None:
        """Called after the last step."""
