"""Stopping a run early: signals and a time limit become a request, which the trainer honours between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]  # Ctrl-C; kill and most schedulers; a closed terminal; Slurm's --signal


@dataclass
class StopRequests:
    """Whether and why to stop. The first signal requests it. With ``insist``, a second one raises
    ``KeyboardInterrupt``, which cuts a validation short."""

    max_hours: float | None = None
    insist: bool = True
    reason: str | None = None
    _started: float = field(default_factory=time.monotonic)

    @property
    def requested(self) -> bool:
        hours = (time.monotonic() - self._started) / 3600
        if self.reason is None and self.max_hours is not None and hours >= self.max_hours:
            self.reason = f"max_hours = {self.max_hours:g}"
        return self.reason is not None

    def receive(self, number: int, frame: object) -> None:
        """The handler of a signal."""
        if self.reason is None:
            self.reason = signal.Signals(number).name
        elif self.insist:
            raise KeyboardInterrupt


@contextmanager
def stop_requests(max_hours: float | None = None, *, insist: bool = True) -> Iterator[StopRequests]:
    """Turns signals into requests inside this context. A thread other than the main one receives none."""
    stop = StopRequests(max_hours, insist)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in before:
            signal.signal(number, stop.receive)
    except ValueError:  # only the main thread can handle signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
