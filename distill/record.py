"""What a run writes down besides weights: the numbers of its steps, and the environment that it ran in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError


class Record:
    """Appends to ``metrics.jsonl``, and to TensorBoard's event files in ``tensorboard/`` where that is asked for."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._file = folder / "metrics.jsonl"
        self._writer = _tensorboard(folder / "tensorboard") if tensorboard else None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """One line for ``step``. Raises ``UserError`` if it cannot be written."""
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {self._file}: {error}.") from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import
    except ImportError as error:
        raise UserError("tensorboard: true needs the extra: pip install 'fewstep[tensorboard]'.") from error
    return SummaryWriter(str(folder))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and revision, for ``environment.json``."""
    packages = ("fewstep", "torch", "numpy", "safetensors", "pydantic", "accelerate")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "versions": versions,
        "machine": platform.machine(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """The git commit of this code; None outside a checkout or without git."""
    here, command = Path(__file__).resolve().parent, ["git", "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The processor's name; on Linux ``platform`` does not know it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
