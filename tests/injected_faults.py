"""Commands in forked processes in which a file operation kills the process or fails, on purpose.

An *event* is an operation that changes files: opening one for writing, a rename, a removal, a new folder, ``fsync``, a
safetensors file. Events below ``root`` are numbered from 1, in the order in which the command causes them.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
from safetensors import SafetensorError

import fewstep
import fewstep.core.files
from fewstep.cli.main import main
from fewstep.core.torchvision_compat import prepare_torchvision

Kind = Literal["kill", "tear", "fail"]
NEEDS_SPACE = ("open", "mkdir", "fsync", "save")  # the operations that a full disk refuses
AUDITED = {"os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SECONDS = 120  # after which a command is taken to hang


class Event(NamedTuple):
    """An operation (open, rename, remove, rmdir, mkdir, fsync, save) on ``path``, which a rename moves to ``to``."""

    operation: str
    path: str
    to: str = ""


@dataclass(frozen=True)
class Fault:
    """What happens before the ``at``-th event: the process is killed, or the operation fails with the error ``number``,
    as do (``lasting``) all later ones that need space. ``tear`` kills it half-way through a safetensors file."""

    at: int
    kind: Kind = "kill"
    number: int = errno.ENOSPC
    lasting: bool = False


class Ended(NamedTuple):
    """How a command ended: its exit code (minus the signal's number), what it printed, its events."""

    code: int
    text: str
    events: list[Event]
    seconds: float

    @property
    def in_words(self) -> bool:
        """Whether it ended with a message for people."""
        plain = not any(word in self.text for word in ("Traceback", "unexpected;"))
        return self.code in (1, 2) and plain and "Error" in self.text


def preload(*, pipelines: bool = True) -> None:
    """Imports what commands import when they run, so that each fork need not. Call it once, in the parent."""
    prepare_torchvision()
    for module in pkgutil.walk_packages(fewstep.__path__, "fewstep."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    others = ("peft", "diffusers") if pipelines else ()
    for name in ("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", *others):
        importlib.import_module(name)


def run_command(
    arguments: Sequence[object], root: Path, *, fault: Fault | None = None,
    kill_after: float | None = None, limit: int | None = None, before: Callable[[], None] | None = None,
) -> Ended:  # fmt: skip
    """Runs ``fewstep ARGUMENTS`` in a fork of this process, which must have no threads.

    ``kill_after`` kills it after some seconds, ``limit`` is the largest size of a file in bytes that the system lets it
    write, ``before`` is called in the fork first.
    """
    (output, printed), (log, logged) = _pipe(), _pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _become_command(printed, logged, root, fault, limit, before)
            sys.argv = ["fewstep", *map(str, arguments)]
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # a traceback in the output
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    for descriptor in (printed, logged):
        os.close(descriptor)
    status = _wait(pid, started + (kill_after or SECONDS))
    seconds = time.monotonic() - started
    with os.fdopen(output, errors="replace") as text, os.fdopen(log) as events:
        found = [Event(*line.split("\t")) for line in events.read().splitlines()]
        return Ended(os.waitstatus_to_exitcode(status), text.read(), found, seconds)


def _pipe() -> tuple[int, int]:
    """A pipe that takes everything that a command prints: the system limits the size of its files."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    return reader, writer


def _wait(pid: int, deadline: float) -> int:
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.002)


def _become_command(
    printed: int, logged: int, root: Path, fault: Fault | None, limit: int | None, before: Callable[[], None] | None
) -> None:
    """Turns a fresh fork into the process of a command, with its output and its events in pipes."""
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if before is not None:
        before()
    _Observer(logged, f"{root}/", fault).install()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _full_path(path: str, folder: int) -> str:
    """``path`` where it is relative to the open ``folder``, as in ``shutil.rmtree``."""
    return path if folder == -1 or os.path.isabs(path) else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"


class _Observer:
    def __init__(self, log: int, root: str, fault: Fault | None) -> None:
        self.log, self.root, self.fault, self.count = log, root, fault, 0

    def install(self) -> None:
        save, sync = safetensors.torch.save_file, os.fsync

        def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
            """safetensors' writer is native code, which no audit event announces."""
            half = self.event("save", str(filename), error=SafetensorError)
            save(tensors, filename, metadata)
            if half:
                os.truncate(filename, os.path.getsize(filename) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor: int) -> None:
            self.event("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            sync(descriptor)

        os.fsync = fsync
        for module in list(sys.modules.values()):
            if getattr(module, "save_file", None) is save:
                module.save_file = save_file  # type: ignore[attr-defined]
        assert fewstep.core.files.save_file is save_file
        sys.addaudithook(self.audited)

    def audited(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & WRITES
            if writes and not isinstance(path, int):
                self.event("open", os.fsdecode(path))
        elif name == "os.rename":
            self.event("rename", *map(os.fsdecode, arguments[:2]))
        elif name in AUDITED:
            self.event(AUDITED[name], _full_path(os.fsdecode(arguments[0]), arguments[-1]))

    def event(self, operation: str, path: str, to: str = "", error: Callable[[str], Exception] | None = None) -> bool:
        """Counts an event and lets its fault happen; returns whether to tear the file."""
        if not f"{path}/".startswith(self.root):
            return False
        self.count += 1
        fault = self.fault if self.fault is not None and self.count >= self.fault.at else None
        now = fault is not None and self.count == fault.at
        if fault and fault.kind == "fail" and (now or (fault.lasting and operation in NEEDS_SPACE)):
            text = os.strerror(fault.number)
            raise error(f"I/O error: {text}") if error else OSError(fault.number, text, path)
        os.write(self.log, f"{operation}\t{path}\t{to}\n".encode())
        if fault and now and fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return fault is not None and now and fault.kind == "tear"
