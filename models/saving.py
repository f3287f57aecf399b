"""Saving models: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors, write_text
from fewstep.core.finite import first_non_finite
from fewstep.core.json_files import read_json_object
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import base_sha256
from fewstep.models.model_config import ModelConfig


def save_model(denoiser: Denoiser, config: ModelConfig, folder: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``. Raises ``UserError`` if the folder cannot be written."""
    save_weights(denoiser.backbone.state_dict(), config, Path(folder))


def save_weights(tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """The same for a backbone's state dict."""
    config = bound_to_base(config)
    write_tensors(tensors, folder / "model.safetensors")
    write_text(json.dumps(config.model_dump(mode="json", exclude_none=True), indent=2) + "\n", folder / "config.json")


def require_sound(folder: Path) -> None:
    """Raises ``UserError`` if a saved model cannot be read, or has a number that is not finite."""
    read_json_object(folder / "config.json")
    if (name := first_non_finite(read_tensors(folder / "model.safetensors"))) is not None:
        raise UserError(f"{folder / 'model.safetensors'} is damaged: {name} has numbers that are not finite.")


def bound_to_base(config: ModelConfig) -> ModelConfig:
    """The config of an adapter with the hash of its base's weights; any other as it is."""
    if config.lora is None or config.base is None:
        return config
    return config.model_copy(update={"base_sha256": base_sha256(config.base)})
