"""Values of the host on another device, copied so that the host does not wait for the device.

Schedules, times and row numbers are computed on the host, in float64 or int64. A copy of pageable memory to a GPU first
waits for all work that was queued there; a copy of pinned memory is queued behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without a wait if it is in host memory."""
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type != "cuda":
        return tensor.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():  # a replay would copy what is at this place of the host's memory then
        raise RuntimeError("a value of the host is sent to the GPU while a CUDA graph is recorded")
    return tensor.pin_memory().to(device, non_blocking=True)


def like(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """``values`` of any shapes, rounded to the type of ``x`` and on its device: one copy for all those of the host."""
    if x.device.type == "cpu" or any(value.device.type != "cpu" for value in values):
        return tuple(value.to(x) for value in values)
    packed = torch.cat([value.to(x.dtype).reshape(-1) for value in values])
    parts = send(packed, x.device).split([value.numel() for value in values])
    return tuple(part.reshape(value.shape) for part, value in zip(parts, values, strict=True))
