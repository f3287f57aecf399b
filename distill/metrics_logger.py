"""Numbers of a run as JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.core.errors import UserError


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
