"""JSON files, read with clear errors."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewstep.core.errors import UserError, kind_of
from fewstep.core.files import reading


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises ``UserError`` if it is missing or damaged."""
    with reading(file, "JSON file"):
        return json.loads(file.read_bytes().decode("utf-8"), object_pairs_hook=without_repetition)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``UserError`` if it is missing, damaged, or holds something else."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} must contain a JSON object, not {kind_of(value)}. Restore it.")
    return value


def read_json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a .jsonl file, one per line, and the number of other lines, which are skipped: a process that was
    killed may leave half a line. Raises ``UserError`` if the file cannot be read."""
    with reading(file, "text file"):
        lines = file.read_bytes().splitlines()
    found: list[dict[str, Any]] = []
    lines = [line for line in lines if line.strip()]
    for line in lines:
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found, len(lines) - len(found)


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of keys and values; for ``json.loads``, which takes the last of equal keys. Raises ``ValueError`` if a
    key is repeated."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} is repeated")
    return found
