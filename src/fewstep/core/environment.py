"""The environment of a run: versions, machine and revision, for ``environment.json``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


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
