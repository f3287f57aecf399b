"""Hashes of contents: what a score was computed from, whatever its path."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.adapters import AdapterView
from fewstep.models.loading import Model


def json_sha256(content: Any) -> str:
    """The hash of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_sha256(model: Model) -> str:
    """The hash of a model's tensors and of the settings of its config other than paths and names for people."""
    backbone = model.denoiser.backbone
    modules: list[nn.Module] = [backbone, *([backbone.shared_network] if isinstance(backbone, AdapterView) else [])]
    settings = model.config.model_dump(mode="json", exclude={"base", "class_names"})
    for later in ("vocabulary", "expert_backbones"):
        if settings[later] is None:  # hashes from before there were such settings stay valid
            del settings[later]
    if settings["few_step"] and settings["few_step"]["frame_by_frame"] is None:
        del settings["few_step"]["frame_by_frame"]
    digest = hashlib.sha256(json_sha256(settings).encode())
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(content.numpy().data)
    return digest.hexdigest()
