"""Stopping a run early: signals and a time limit become a request, which the trainer honours between two steps.

Until training begins, and where it was not begun, signals end the process as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TypeVar

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]  # Ctrl-C; kill and most schedulers; a closed terminal; Slurm's --signal
T = TypeVar("T")
AGAIN = " A second signal leaves out a validation, a third one loses what follows the last checkpoint."
CUT, END = 2, 3  # how many signals cut an evaluation short, and a step, whose work is lost


@dataclass
class StopRequests:
    """Whether and why to stop. The first signal requests it, which ``announce`` tells on standard error: a step can
    last minutes. Inside ``raising_at``, and only with ``insist``, further ones raise ``KeyboardInterrupt``: elsewhere
    files are written."""

    max_hours: float | None = None
    insist: bool = True
    announce: bool = False
    reason: str | None = None
    _received: int = 0
    _limit: int | None = None
    _started: float = field(default_factory=time.monotonic)

    @property
    def requested(self) -> bool:
        hours = (time.monotonic() - self._started) / 3600
        if self.reason is None and self.max_hours is not None and hours >= self.max_hours:
            self.reason = f"max_hours = {self.max_hours:g}"
        return self.reason is not None

    def receive(self, number: int, frame: object) -> None:
        """The handler of a signal."""
        self._received += 1
        self.reason = self.reason or signal.Signals(number).name
        if self._received == 1 and self.announce:
            text = f"\n{self.reason}: training stops after this step and what is due after it, with a checkpoint."
            text += AGAIN if self.insist else ""
            os.write(2, f"{text}\n".encode())  # not by print, which may be what was interrupted
        if self._limit is not None and self._received >= self._limit:
            raise KeyboardInterrupt

    @contextmanager
    def raising_at(self, count: int) -> Iterator[None]:
        """Inside, a signal raises ``KeyboardInterrupt`` if it is at least the ``count``-th."""
        try:
            self._limit = count if self.insist else None
            yield
        finally:
            self._limit = None

    def unless_cut(self, work: Callable[[], T], otherwise: T) -> T:
        """The result of work that can be left out, or ``otherwise`` if a second signal comes before its end."""
        with suppress(KeyboardInterrupt), self.raising_at(CUT):
            if not self.insist or self._received < CUT:
                return work()
        return otherwise

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no signal raises. One that would have raises at the end."""
        limit, received = self._limit, self._received
        try:
            self._limit = None
            yield
        finally:
            self._limit = limit
        if limit is not None and self._received >= max(limit, received + 1):
            raise KeyboardInterrupt


_active: list[StopRequests] = []


def undisturbed() -> AbstractContextManager[None]:
    """A context that no signal leaves half done, such as an exchange of weights that training goes on with."""
    return _active[-1].held() if _active else nullcontext()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Inside, every signal raises ``KeyboardInterrupt`` as Ctrl-C does, so that a command that is loading says that it
    ended and cleans up. In a thread other than the main one this changes nothing."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with handling(interrupt):
        yield


@contextmanager
def handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, ``handler`` receives the signals, but no SIGHUP under ``nohup``. A thread other than the main one can
    receive none."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: old for n, old in before.items() if not (old == signal.SIG_IGN and n == getattr(signal, "SIGHUP", 0))}
    try:
        for number in before:
            signal.signal(number, handler)
    except ValueError:  # only the main thread can handle signals
        yield
        return
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_requests(max_hours: float | None = None, rank: int = 0, processes: int = 1) -> Iterator[StopRequests]:
    """Turns signals into requests inside this context. A thread other than the main one receives none. Of several
    processes none is cut short, because the others would wait for it, and the first one announces a stop."""
    stop = StopRequests(max_hours, insist=processes == 1, announce=rank == 0)
    with handling(stop.receive):
        _active.append(stop)
        try:
            yield stop
        finally:
            _active.remove(stop)
