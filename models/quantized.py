"""Linear layers of frozen networks in 8 or 4 bits, for training adapters: LLM.int8 (arXiv 2208.07339) and QLoRA's NF4
(arXiv 2305.14314), by bitsandbytes. Merge adapters into the full-precision weights, never into these."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from torch import nn

from fewstep.core.errors import UserError

Bits = Literal["int8", "nf4"]


def quantize(network: nn.Module, bits: Bits) -> None:
    """Replaces the linear layers inside the blocks of a frozen ``network``, in place. Others are kept: they are few,
    and embeddings compute in the dtype of their layers' weights.

    Raises ``UserError`` if bitsandbytes is not installed.
    """
    bnb = require_bitsandbytes()
    for path, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Linear) or not is_quantized(path, layer):
            continue
        size, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if bits == "int8":
            small = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False)
        else:
            small = bnb.nn.Linear4bit(*size, bias, quant_type="nf4", compute_dtype=layer.weight.dtype)
            small.support_avx512bf16_for_cpu = False  # would repack the weights for inference at the first call
        small.load_state_dict(layer.state_dict())
        if bias:
            small.bias.data = small.bias.data.to(layer.weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, small.requires_grad_(False).to(layer.weight.device))


def is_quantized(path: str, layer: nn.Module) -> bool:
    """Whether ``quantize`` replaces the layer at this path: a linear one inside a block."""
    path = re.sub(r"^(experts\.\d+\.)+", "", path)  # networks in a Routed one, not blocks
    return type(layer) is nn.Linear and any(part.isdigit() for part in path.split(".")[:-1])  # blocks: a ModuleList


def quantized_bytes(layer: nn.Linear, bits: Bits) -> int:
    """Bytes of a layer after ``quantize``: 8 bits and a float32 scale per row, or 4 bits and an 8-bit scale for each 64
    weights, which have a float32 scale for each 256 of them, a float32 mean and two tables of 16 and 256 values."""
    n = layer.weight.numel()
    bias = layer.bias.numel() * layer.bias.element_size() if layer.bias is not None else 0
    if bits == "int8":
        return n + 4 * layer.out_features + bias
    scales = math.ceil(n / 64)
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (1 + 16 + 256) + bias


def require_bitsandbytes() -> Any:
    """The bitsandbytes package. Raises ``UserError`` if it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "8-bit and 4-bit weights and optimizers need an extra: pip install 'fewstep[quantized]'."
        ) from error
    return bitsandbytes
