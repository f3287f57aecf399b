"""Names on the command line that may be local folders or ids on the hub."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.errors import nearest

RUNS = "runs"  # where the configs of this project write


def is_hub_id(source: str) -> bool:
    """Whether a text may be a hub id, ``owner/name``, and does not look like a path: one that exists, that begins with
    ``.``, ``~`` or ``/``, that has more than two parts, or whose first part exists or is ``runs``."""
    parts = source.split("/")
    if len(parts) != 2 or not all(parts) or source.startswith((".", "~")) or parts[0] == RUNS:
        return False
    return not Path(source).exists() and not Path(parts[0]).exists()


def nearest_folder(path: Path) -> str:
    """A hint for a message about a path that does not exist: the folder beside it that is called most like it, or the
    nearest one above it that exists."""
    existing = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
    if existing == path.parent:
        return nearest(str(path), sorted(str(child) for child in existing.iterdir() if child.is_dir()))
    return f"; the nearest folder that exists is {str(existing.resolve())!r}"
