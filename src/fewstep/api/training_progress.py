"""Progress of a training run: a bar on a terminal, else lines by time; losses, scores, warnings of the diagnosis."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fewstep.distill.callback import Callback
from fewstep.distill.loop import LostUpdate
from fewstep.distill.trainer import Trainer
from fewstep.eval.report.diagnosis import WINDOW, diagnose

FIRST_LINE, LINES = 5.0, 30.0  # seconds to the first line, and between later ones
RECENT = 50  # steps whose mean duration is the speed; at least twice the steps from one log line to the next


class TrainingProgress(Callback):
    """Use as a context manager, and as the first callback within. Where standard output is no terminal (a batch job, a
    notebook), it prints a line after ``FIRST_LINE`` seconds, then every ``LINES`` seconds, and at every validation,
    checkpoint and at the end. Each finding of the diagnosis is printed once. ``quiet`` prints nothing."""

    def __init__(self, steps: int, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._clock = steps, clock
        self._console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
        columns = (BarColumn(bar_width=16), TextColumn("{task.description}", markup=False))
        shown = self._console.is_terminal and not quiet
        self._bar = Progress(*columns, console=self._console, transient=True) if shown else None
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._begun = 0.0
        self._next_line = clock() + FIRST_LINE
        self._line = ""
        self._losses = self._score = ""
        self._steps_done = 0
        self._logged: list[dict[str, float]] = []
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("loading", total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def before_training(self, text: str) -> None:
        """Shows what is done before the first step, which can take minutes."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._print(f"Before the first step: {text}.")

    # --- events -------------------------------------------------------------------------------------------------------

    def on_note(self, trainer: Trainer, text: str) -> None:
        self._print(text, "yellow")

    def on_step_begin(self, trainer: Trainer) -> None:
        if self._steps_done == 0:
            self._durations = deque(maxlen=max(RECENT, 2 * trainer.config.log_every))
            if trainer.best:  # of a resumed run
                self._score = f"best score {trainer.best['value']:.4g}"
        self._begun = self._clock()

    def on_step(self, trainer: Trainer) -> None:
        self._steps_done += 1
        self._durations.append(self._clock() - self._begun)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.step, description=self._state(trainer))
        elif self._clock() >= self._next_line:
            self._print_line(trainer)

    def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
        self._print(str(lost), "yellow")

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        self._losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4f}" for name, value in values.items() if "loss/" in name
        )
        config = trainer.config
        kept = max(WINDOW, -(-config.health.every // config.log_every) + 1)  # lines; one of them has a health check
        self._logged = [*self._logged, values][-kept:]
        for finding in diagnose(self._logged):
            if finding.name not in self._warned:
                self._warned.add(finding.name)
                self._print(f"step {trainer.step}: {finding.text}", "yellow")

    def on_validation(self, trainer: Trainer, value: float) -> None:
        self._score = f"score {value:.4g} (best {trainer.best['value']:.4g})"
        self._print_line(trainer)

    def on_checkpoint(self, trainer: Trainer) -> None:
        self._print_line(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._steps_done:
            self._print(f"Trained {trainer.step} steps in {trainer.seconds:.0f} s.")
        else:
            self._print(f"All {trainer.step} steps of this run were done already.")

    # --- text ---------------------------------------------------------------------------------------------------------

    def _state(self, trainer: Trainer) -> str:
        """Step, speed, time left, losses and score. The speed is the mean duration of recent steps, without what comes
        between them: validation, previews, checkpoints."""
        seconds = sum(self._durations) / len(self._durations)
        left = self._steps - trainer.step
        eta = f"ETA {timedelta(seconds=round(seconds * left))}" if left else ""
        parts = [f"step {trainer.step}/{self._steps}", f"{seconds:.3g} s/step", eta, self._losses, self._score]
        return "  ".join(filter(None, parts))

    def _print_line(self, trainer: Trainer) -> None:
        """Off a terminal: one line with the present state, unless it is there already."""
        self._next_line = self._clock() + LINES
        line = self._state(trainer)
        if self._bar is None and line != self._line:
            self._line = line
            self._print(line)

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text.encode(errors="backslashreplace").decode(), style=style)
