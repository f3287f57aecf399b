"""A small U-Net for videos: the image U-Net on every frame, with layers over the frames between its levels.

The layers over frames are residual and initially zero, as in VideoLDM (arXiv 2304.08818), so that a network with the
weights of an image U-Net starts by drawing independent images. Frames have no positions: the convolutions order them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.models.attention import attention
from fewstep.models.backbone import Past
from fewstep.models.condition import Condition
from fewstep.models.unet import Attention, UNet

TAPS = 3  # frames that a convolution sees
ALL = 2**31  # frames of context


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
        return self._mixed(x, F.pad(self._features(x), self.padding))

    def after(self, past: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same for frames ``x`` that follow those of ``past``, features [B, C, TAPS - 1, H W] of which are kept."""
        h = self._features(x)
        h = F.pad(h, self.padding) if past is None else torch.cat([past, h], 2)
        return self._mixed(x, h), h[:, :, 1 - TAPS :].clone()

    def _features(self, x: Tensor) -> Tensor:
        return F.silu(unfold(self.norm(fold(x)), x.shape[2]).flatten(3))

    def _mixed(self, x: Tensor, h: Tensor) -> Tensor:
        residual: Tensor = self.conv(h).unflatten(3, x.shape[3:])
        return x + residual


class TemporalAttention(Attention):
    """Residual attention over the frames of [B, C, F, H, W], at each position; with ``context``, over so many frames up
    to each, itself included."""

    def __init__(self, width: int, heads: int, *, context: int | None) -> None:
        super().__init__(width, heads)
        self.context = context
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x, *self._qkv(x))

    def after(self, past: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same for frames ``x`` that follow those of ``past``, of which the keys and values that later frames see
        are kept, [B, H W, 2, heads, frames, D]."""
        assert self.context is not None
        q, *kv = self._qkv(x)
        if past is not None:
            before = past.flatten(0, 1)
            kv = [torch.cat([before[:, i], kv[i]], 2) for i in range(2)]
        first = max(0, kv[0].shape[2] - self.context + 1)
        kept = torch.stack([each[:, :, first:] for each in kv], 1)
        return self._mixed(x, q, *kv), kept.unflatten(0, (len(x), -1))

    def _qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values, [3, B H W, heads, F, D]."""
        b, c, f, h, w = x.shape
        qkv: Tensor = self.qkv(self.norm(fold(x))).reshape(b, f, 3, self.heads, c // self.heads, h * w)
        return qkv.permute(2, 0, 5, 3, 1, 4).flatten(1, 2)

    def _mixed(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        out = attention(q, k, v, self.backend, context=self.context)
        out = out.reshape(b, h * w, self.heads, f, c // self.heads).permute(0, 3, 2, 4, 1).reshape(b * f, c, h, w)
        return x + unfold(self.out(out), f)


class VideoUNet(UNet):
    """Backbone ``(x_t [B, C, F, H, W], t, condition) -> [B, C, F, H, W]`` for any number of frames. ``t`` is [B], or
    [B, 1, F, 1, 1] for frames at different noise levels.

    Settings and weights are those of ``UNet``, and the layers over frames follow each level: a convolution, and except
    at the finest level attention. With ``causal``, a frame depends on the frames up to it alone, of which attention
    sees the last ``context`` (by default all), so that frames can be evaluated one after the other (``after``).
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
        context: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(widths=widths, blocks=blocks, heads=heads, **settings)
        if any(width % heads for width in widths[1:]):
            raise ValueError("all widths but the first must be multiples of heads")
        if context is not None and (not causal or context < 1):
            raise ValueError("context is a number of frames, from 1, for a causal network")
        self.causal = causal
        seen = (context or ALL) if causal else None
        outer = range(len(widths) - 1)
        levels = [*outer, *[len(outer)] * blocks[-1], *reversed(outer)]
        self.temporal = nn.ModuleList()
        for level in levels:
            layers: list[nn.Module] = [TemporalConv(widths[level], causal=causal)]
            if level or not outer:
                layers.append(TemporalAttention(widths[level], heads, context=seen))
            self.temporal.append(nn.Sequential(*layers))
        self.feature_layers = (f"temporal.{len(outer)}",)  # after the first block of the middle
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._evaluate_frames(x, t, condition, lambda level, h: self.temporal[level](h))

    def after(self, past: Past | None, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Past]:
        """The output for frames ``x`` [B, C, F, H, W] that follow others, and what the frames after them need, which
        with ``context`` does not grow. ``past`` is that of the frames before, at the noise levels at which they were
        evaluated; None at the start. Raises ``ValueError`` if the network is not causal.

            past = None
            for noise in frames:  # an autoregressive video: the cache holds clean frames
                out, _ = network.after(past, noise, t, condition)
                _, past = network.after(past, clean, zero, condition)
        """
        if not self.causal:
            raise ValueError("frames of a network that is not causal depend on later ones")
        before, kept = iter(past or ()), []

        def over_frames(level: int, h: Tensor) -> Tensor:
            for layer in self.temporal[level].children():
                assert isinstance(layer, TemporalConv | TemporalAttention)
                h, last = layer.after(next(before, None), h)
                kept.append(last)
            return h

        return self._evaluate_frames(x, t, condition, over_frames), tuple(kept)

    def _evaluate_frames(
        self, x: Tensor, t: Tensor, condition: Condition, over_frames: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        frames = x.shape[2]
        times = frame_times(t, frames).flatten()

        def after_level(level: int, h: Tensor) -> Tensor:
            return fold(over_frames(level, unfold(h, frames)))

        return unfold(self.evaluate(fold(x), times, condition.repeat(frames), after_level), frames)


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
