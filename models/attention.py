"""Attention backends: one function for fewstep's own networks, and the same choice for diffusers' dispatcher.

``sdpa`` lets torch choose the kernel by device and shape, in training not cuDNN's (``without_cudnn``); the next four
force flash, cuDNN, memory-efficient or plain attention. ``xformers`` needs an extra, ``flex`` is fast where the network
is compiled (``compile: true``) only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "sdpa", *, context: int | None = None) -> Tensor:
    """Softmax attention of queries [B, H, N, D] over keys and values [B, H, M, D] -> [B, H, N, D].

    With ``context`` it is causal: the queries are the last N of the M positions, and each sees the last ``context``
    positions up to its own. Flash attention has a mask only for N = M <= ``context``; otherwise torch chooses.

    Raises ``RuntimeError`` if the kernel does not support these shapes, dtypes or the device (see ``runs``).
    """
    n, m = q.shape[2], k.shape[2]
    if context is not None and n == 1 and m <= context:
        context = None  # the one query sees all keys
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

        bias = None if context is None else LocalAttentionFromBottomRightMask(min(context, m) - 1, 0)
        out: Tensor = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
        return out.transpose(1, 2)
    triangle = context is not None and n == m <= context and backend != "flex"
    mask = None if context is None or triangle else _seen(n, m, context, q.device)
    if backend == "flex":
        return _flex()(q, k, v, score_mod=None if mask is None else _masked(mask))
    own_choice = backend == "sdpa" or (backend == "flash" and mask is not None)
    with nullcontext() if own_choice else sdpa_kernel(KERNELS[backend]):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=triangle)


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Inside this context torch does not choose cuDNN's kernel by itself, also where a backward pass recomputes. On an
    H100 torch 2.11 prefers it, and its gradients are not to be trusted: training adapters of FLUX.1 failed in its
    backward pass, and with a mask some are NaN (https://github.com/pytorch/pytorch/issues/196678)."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _seen(n: int, m: int, context: int, device: torch.device) -> Tensor:
    """The keys [n, m] that causal queries, the last n of m positions, see."""
    distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (distance >= 0) & (distance < context)


def _masked(seen: Tensor) -> Callable[..., Tensor]:
    """Scores with those of unseen keys removed, as ``flex_attention`` takes them."""
    return lambda score, batch, head, query, key: torch.where(seen[query, key], score, -torch.inf)


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def runs(backend: Backend, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a backend computes attention and its gradient on this device, tried on a small example."""
    q, k, v = (torch.randn(1, 2, 16, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        attention(q, k, v, backend).sum().backward()
    except (RuntimeError, NotImplementedError, ImportError, ValueError, AssertionError):
        return False
    return True


def set_attention(
    backbone: nn.Module, backend: Backend, device: torch.device, precision: torch.dtype = torch.float32
) -> None:
    """Makes a network that computes in ``precision`` use ``backend``; ``sdpa``, the default, changes nothing.

    Raises ``UserError`` if the backend does not run on ``device`` in this precision (the message lists those that do;
    flash and cuDNN on a GPU need bfloat16) or if the network has no attention layers.
    """
    if backend == "sdpa":
        return
    if not runs(backend, device, precision):
        working = ", ".join(name for name in get_args(Backend) if runs(name, device, precision))
        kind = str(precision).removeprefix("torch.")
        raise UserError(f"attention: {backend} is not available on {device.type} in {kind}; available: {working}.")
    if networks := [module.network for module in backbone.modules() if isinstance(module, HubBackbone)]:
        for network in networks:
            network.set_attention_backend(DIFFUSERS[backend])
        return
    layers = [module for module in backbone.modules() if isinstance(module, AttentionLayer)]
    if not layers:
        raise UserError(f"attention: {backend} has no effect on a {type(backbone).__name__}; remove the setting.")
    for layer in layers:
        layer.backend = backend


class AttentionLayer(nn.Module):
    """Base class of fewstep's attention layers: holds the backend that they use."""

    backend: Backend = "sdpa"
