"""The device that a run computes on."""

from __future__ import annotations

import torch

from fewstep.core.errors import UserError, nearest

CPU = torch.device("cpu")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then Apple's GPU, then the CPU. Raises ``UserError`` if the requested device is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if name not in available:
        raise UserError(f"Unknown device {name!r}{nearest(name, available)}; there are auto, {', '.join(available)}.")
    if not available[name]:
        raise UserError(f"device={name} was requested, but torch {torch.__version__} finds none here. Use device=auto.")
    return torch.device(name)
