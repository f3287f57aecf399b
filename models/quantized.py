"""Linear layers of frozen networks in 8 or 4 bits, for training adapters: LLM.int8 (arXiv 2208.07339) and QLoRA's NF4
(arXiv 2305.14314), by bitsandbytes. Merge adapters into the full-precision weights, never into these."""

from __future__ import annotations

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
        in_a_block = any(part.isdigit() for part in path.split(".")[:-1])  # blocks are in a ModuleList
        if type(layer) is not nn.Linear or not in_a_block:
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


def require_bitsandbytes() -> Any:
    """The bitsandbytes package. Raises ``UserError`` if it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "8-bit and 4-bit weights and optimizers need an extra: pip install 'fewstep[quantized]'."
        ) from error
    return bitsandbytes
