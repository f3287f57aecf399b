"""Frozen networks that wait in host memory between reads: room on the accelerator, for a transfer a read."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


class OffloadedModule:
    """A frozen network's weights in host memory; ``fetch`` copies them to ``device``, ``release`` drops the copy."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._home = [(tensor, self._at_home(tensor)) for tensor in chain(module.parameters(), module.buffers())]
        self.release()

    def fetch(self) -> None:
        for tensor, home in self._home:
            if tensor.data_ptr() == home.data_ptr():
                tensor.data = home.to(self._device, non_blocking=True, copy=True)

    def release(self) -> None:
        for tensor, home in self._home:
            tensor.data = home

    def _at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        home = tensor.detach().cpu()
        return home.pin_memory() if self._device.type == "cuda" else home
