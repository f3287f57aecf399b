"""Fused attention behind one function for our own networks, and the same choice for diffusers' dispatcher.

``sdpa`` is torch's own, which picks flash, cuDNN, memory-efficient or plain kernels by device and shape; the next four
force one of these. ``xformers`` and ``flex`` are asked for by name: the first is an extra, the second compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.errors import UserError
from fewstep.models.hub.family import HubBackbone

Backend = Literal["sdpa", "flash", "cudnn", "efficient", "math", "xformers", "flex"]
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DIFFUSERS = {
    "sdpa": "native", "flash": "_native_flash", "cudnn": "_native_cudnn", "efficient": "_native_efficient",
    "math": "_native_math", "xformers": "xformers", "flex": "flex",
}  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "sdpa") -> Tensor:
    """Softmax attention of queries [B, H, N, D] over keys and values [B, H, M, D] -> [B, H, N, D].

    Raises ``RuntimeError`` if the kernel does not serve these shapes, types or device (see ``runs``).
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return out
    if backend == "flex":
        return _flex()(q, k, v)
    with sdpa_kernel(KERNELS[backend]):
        return F.scaled_dot_product_attention(q, k, v)


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def runs(backend: Backend, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a backend computes attention and its gradient here: tried on a small example."""
    q, k, v = (torch.randn(1, 2, 16, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        attention(q, k, v, backend).sum().backward()
    except (RuntimeError, NotImplementedError, ImportError, ValueError, AssertionError):
        return False
    return True


def set_attention(backbone: nn.Module, backend: Backend, device: torch.device) -> None:
    """Makes a network use ``backend`` (``sdpa`` is what it uses anyway).

    Raises ``UserError`` that lists those that run here if this one does not.
    """
    if backend == "sdpa":
        return
    if not runs(backend, device):
        working = ", ".join(name for name in get_args(Backend) if runs(name, device))
        raise UserError(f"attention: {backend} does not run on {device.type} here; these do: {working}.")
    if isinstance(backbone, HubBackbone):
        backbone.network.set_attention_backend(DIFFUSERS[backend])
        return
    layers = [module for module in backbone.modules() if isinstance(module, AttentionLayer)]
    if not layers:
        raise UserError(f"attention: {backend} has no effect on a {type(backbone).__name__}; remove the setting.")
    for layer in layers:
        layer.backend = backend


class AttentionLayer(nn.Module):
    """Base of our own attention layers: which backend they use."""

    backend: Backend = "sdpa"
