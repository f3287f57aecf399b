"""Numbers of a run as JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_write, reading


def append_line(file: Path, record: Mapping[str, object]) -> None:
    """Appends a JSON object, on a line of its own even after half a line of a process that was killed. Raises
    ``UserError`` if it cannot be written."""
    try:
        with file.open("a+b") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            newline = b"" if stream.read(1) in (b"", b"\n") else b"\n"
            stream.write(newline + json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(f"Cannot write {file}: {error}.") from error


def to_numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics as numbers, without those that are not finite: losses of a lost update, and diagnostics to which no
    sample contributed (an empty range of times)."""
    values = {name: value.item() for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def forget_after(file: Path, step: int) -> None:
    """Removes the lines of steps after ``step``, which training repeats, and half a line of a process that was killed.
    Raises ``UserError`` if the file cannot be read or written."""
    if not file.is_file():
        return
    with reading(file, "log"):
        *lines, half = file.read_bytes().split(b"\n")
    kept = [line for line in lines if not _step_of(line) > step]
    if half or kept != lines:
        with atomic_write(file) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    if not kept:
        file.unlink()


def _step_of(line: bytes) -> float:
    """The step of a line; 0 for a damaged one."""
    with suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("step"), int | float):
            return float(value["step"])
    return 0.0
