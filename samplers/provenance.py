"""Which model a file of fitted coefficients belongs to."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.errors import UserError
from fewstep.models.denoiser import Denoiser
from fewstep.models.weights_hash import weights_hash


def check_model(file: Path, recorded: str | None, denoiser: Denoiser | None, command: str) -> None:
    """Raises ``UserError`` if ``file`` records the weights of another model; older files record none."""
    if recorded is not None and denoiser is not None and weights_hash(denoiser) != recorded:
        raise UserError(f"{file} was fitted to other weights than this model's: run {command} for this model.")
