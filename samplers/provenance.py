"""Which model a file of fitted coefficients belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fewstep.core.errors import UserError
from fewstep.models.denoiser import Denoiser


def weights_hash(denoiser: Denoiser) -> str:
    """SHA-256 of the names, types, shapes and values of a model's weights, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(denoiser.backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_model(file: Path, recorded: str | None, denoiser: Denoiser | None, command: str) -> None:
    """Raises ``UserError`` if ``file`` records the weights of another model; older files record none."""
    if recorded is not None and denoiser is not None and weights_hash(denoiser) != recorded:
        raise UserError(f"{file} was fitted to other weights than this model's: run {command} for this model.")
