"""Progress of a training run on the terminal: a bar, losses, and warnings of the diagnosis."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from fewstep.cli.options import out, print_text, progress_bar
from fewstep.distill.callback import Callback
from fewstep.distill.loop import LostUpdate
from fewstep.distill.trainer import Trainer
from fewstep.eval.report.diagnosis import WINDOW, diagnose


class TrainingProgress(Callback):
    """Use as a context manager, and as a callback within. Each finding of the diagnosis is printed once."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.steps_done = 0
        self._logged: list[dict[str, float]] = []
        self._warned: set[str] = set()
        self._context = progress_bar()

    def __enter__(self) -> Self:
        self._bar = self._context.__enter__()
        self._task = self._bar.add_task("training", total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def on_note(self, trainer: Trainer, text: str) -> None:
        print_text(text, "yellow")

    def on_step(self, trainer: Trainer) -> None:
        self.steps_done += 1
        self._bar.update(self._task, completed=trainer.step)

    def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
        print_text(str(lost), "yellow")

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4f}" for name, value in values.items() if "loss/" in name
        )
        best = f"  best {trainer.best['value']:.2f}" if trainer.best else ""
        self._bar.update(self._task, description=losses + best)
        if not out.is_terminal and trainer.step % (20 * trainer.config.log_every) == 0:
            print_text(f"step {trainer.step}/{self._steps}  {trainer.seconds:.0f} s  {losses}{best}")
        config = trainer.config
        kept = max(WINDOW, -(-config.health.every // config.log_every) + 1)  # lines; one of them has a health check
        self._logged = [*self._logged, values][-kept:]
        for finding in diagnose(self._logged):
            if finding.name not in self._warned:
                self._warned.add(finding.name)
                text = f"step {trainer.step}: {finding.text}"
                print_text(text, "yellow")
