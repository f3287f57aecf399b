"""A small U-Net for videos: the image U-Net on every frame, with layers over the frames between its levels.

The layers over frames are residual and initially zero, as in VideoLDM (arXiv 2304.08818), so that a network with the
weights of an image U-Net starts by drawing independent images. Frames have no positions: the convolutions order them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.models.attention import attention
from fewstep.models.condition import Condition
from fewstep.models.unet import Attention, UNet

TAPS = 3  # frames that a convolution sees


def fold(x: Tensor) -> Tensor:
    """Videos [B, C, F, H, W] as a batch of frames [B F, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, frames: int) -> Tensor:
    """The inverse of ``fold``."""
    return x.reshape(-1, frames, *x.shape[1:]).transpose(1, 2)


class TemporalConv(nn.Module):
    """Residual convolution over the frames of [B, C, F, H, W], at each position; ``causal``: over those up to each."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.padding = (0, 0, TAPS - 1, 0) if causal else (0, 0, TAPS // 2, TAPS // 2)
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, (TAPS, 1))  # positions in one axis: faster than a 3d convolution
        zero(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        frames, height = x.shape[2:4]
        h = F.silu(unfold(self.norm(fold(x)), frames).flatten(3))
        residual: Tensor = self.conv(F.pad(h, self.padding)).unflatten(3, (height, -1))
        return x + residual


class TemporalAttention(Attention):
    """Residual attention over the frames of [B, C, F, H, W], at each position; ``causal``: over those up to each."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__(width, heads)
        self.causal = causal
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        qkv = self.qkv(self.norm(fold(x))).reshape(b, f, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.permute(2, 0, 5, 3, 1, 4).flatten(1, 2)  # [B H W, heads, F, D] each
        out = attention(q, k, v, self.backend, causal=self.causal)
        out = out.reshape(b, h * w, self.heads, f, c // self.heads).permute(0, 3, 2, 4, 1).reshape(b * f, c, h, w)
        return x + unfold(self.out(out), f)


class VideoUNet(UNet):
    """Backbone ``(x_t [B, C, F, H, W], t, condition) -> [B, C, F, H, W]`` for any number of frames. ``t`` is [B], or
    [B, 1, F, 1, 1] for frames at different noise levels.

    Settings and weights are those of ``UNet``, and the layers over frames follow each level: a convolution, and except
    at the finest level attention. With ``causal``, a frame depends on the frames up to it.
    """

    lora_targets = (*UNet.lora_targets, "conv")
    repeated_blocks = (*UNet.repeated_blocks, "TemporalConv", "TemporalAttention")
    sample_axes = "[C, F, H, W]"

    def __init__(
        self,
        *,
        widths: Sequence[int] = (48, 96, 192),
        blocks: Sequence[int] = (2, 2, 2),
        heads: int = 4,
        causal: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(widths=widths, blocks=blocks, heads=heads, **settings)
        if any(width % heads for width in widths[1:]):
            raise ValueError("all widths but the first must be multiples of heads")
        outer = range(len(widths) - 1)
        levels = [*outer, *[len(outer)] * blocks[-1], *reversed(outer)]
        self.temporal = nn.ModuleList()
        for level in levels:
            layers: list[nn.Module] = [TemporalConv(widths[level], causal=causal)]
            if level or not outer:
                layers.append(TemporalAttention(widths[level], heads, causal=causal))
            self.temporal.append(nn.Sequential(*layers))
        self.feature_layers = (f"temporal.{len(outer)}",)  # after the first block of the middle
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        frames = x.shape[2]
        times = frame_times(t, frames).flatten()
        out = self.evaluate(
            fold(x), times, condition.repeat(frames), lambda level, h: fold(self.temporal[level](unfold(h, frames)))
        )
        return unfold(out, frames)


def frame_times(t: Tensor, frames: int) -> Tensor:
    """The time of each frame [B, F], from times [B] or [B, 1, F, 1, 1]. Raises ``ValueError`` on any other shape."""
    if t.ndim == 1:
        return t[:, None].expand(-1, frames)
    if t.ndim == 5 and t.shape[1:] == (1, frames, 1, 1):
        return t.flatten(1)
    raise ValueError(f"times of shape {tuple(t.shape)} are neither [B] nor [B, 1, {frames}, 1, 1]")


def zero(layer: nn.Conv2d) -> None:
    """Makes a layer return zeros."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
