"""Data parallelism over the processes that torchrun or ``accelerate launch`` started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.devices import pick_device


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes."""

    rank: int = 0
    size: int = 1

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in one flat reduction."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


SINGLE_PROCESS = World()


def join_world(name: str = "auto") -> tuple[World, torch.device]:
    """Joins the processes that torchrun or ``accelerate launch`` started; returns rank and number, and the device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS, pick_device(name)
    from accelerate import PartialState  # slow to import

    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available())
    return World(state.process_index, state.num_processes), state.device
