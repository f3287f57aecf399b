"""Names that may be local folders or ids on the hub, names of files in a table, and paths inside others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from fewstep.core.errors import UserError, nearest

RUNS = "runs"  # where the configs of this project write
# A setting that may be a path. No shell replaces a ``~`` in a file, and who deletes a folder called ``~`` may delete
# the wrong one.
MaybePath = Annotated[str, AfterValidator(os.path.expanduser)]


def is_hub_id(source: str) -> bool:
    """Whether a text may be a hub id, ``owner/name``, and does not look like a path: one that exists, that begins with
    ``.``, ``~`` or ``/``, that has more than two parts, or whose first part exists or is ``runs``."""
    parts = source.split("/")
    if len(parts) != 2 or not all(parts) or source.startswith((".", "~")) or parts[0] == RUNS:
        return False
    return not Path(source).exists() and not Path(parts[0]).exists()


def overlap(first: Path, second: Path) -> bool:
    """Whether two paths are the same, or one lies inside the other, also through links."""
    a, b = first.resolve(), second.resolve()
    return a.is_relative_to(b) or b.is_relative_to(a)


def nearest_folder(path: Path) -> str:
    """A hint for a message about a path that does not exist: the folder beside it that is called most like it, or the
    nearest one above it that exists."""
    existing = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
    if existing == path.parent != existing.parent:  # names in the root folder help nobody
        return nearest(str(path), sorted(str(child) for child in existing.iterdir() if child.is_dir()))
    return f"; the nearest folder that exists is {str(existing.resolve())!r}"


def file_inside(folder: Path, name: str, suffixes: Sequence[str], where: str) -> Path:
    """The file that a table names, relative to its folder. Raises ``UserError`` that begins with ``where`` if it is
    missing, outside the folder (also through a link), or of another type."""
    file = folder / name
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
        found = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a name that is too long, a loop of links
        raise UserError(f"{where}: {name!r} is not the name of a file ({error}).") from error
    if not inside:
        raise UserError(f"{where}: {name!r} is outside {folder}; name files in the folder of the table.")
    if not found:
        raise UserError(f"{where}: {name!r} does not exist in {folder}.")
    if file.suffix.lower() not in suffixes:
        raise UserError(f"{where}: {name!r} is not one of {', '.join(suffixes)}.")
    return file
