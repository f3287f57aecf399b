"""Frozen networks kept in host memory between evaluations: saves device memory, costs a transfer per evaluation."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


class OffloadedModule:
    """A frozen network's weights in host memory; ``fetch`` copies them to ``device``, ``release`` drops the copy."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._tensors = [(tensor, self._host_copy(tensor)) for tensor in chain(module.parameters(), module.buffers())]
        self.release()

    def fetch(self) -> None:
        for tensor, host in self._tensors:
            if tensor.data_ptr() == host.data_ptr():
                tensor.data = host.to(self._device, non_blocking=True, copy=True)

    def release(self) -> None:
        for tensor, host in self._tensors:
            tensor.data = host

    def _host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.detach().cpu()
        return host.pin_memory() if self._device.type == "cuda" else host
