"""Which weights a file belongs to: the hash of a network's content, whatever its path."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser


def weights_hash(denoiser: Denoiser) -> str:
    """SHA-256 of the names, types, shapes and values of a model's weights, in hex. A network that is shared by adapters
    is hashed without them."""
    backbone = denoiser.backbone
    if isinstance(backbone, AdapterView):
        backbone = backbone.shared_network
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        if isinstance(value, Tensor) and ".lora_" not in name:
            digest.update(f"{name.replace('.base_layer.', '.')} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
