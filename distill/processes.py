"""Data parallelism over the processes that torchrun or ``accelerate launch`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.devices import pick_device

GROUP = 2**24  # elements that are reduced together: 64 MiB in float32


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes."""

    rank: int = 0
    size: int = 1

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes."""
        self.sum_(tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor /= self.size

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes. They are reduced in groups of at most ``GROUP`` elements,
        which bounds the memory of the copies."""
        if self.size == 1:
            return
        for group in _groups(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type with at most ``GROUP`` elements together; a larger one is alone."""
    group: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in group) + tensor.numel() > GROUP
        if group and (full or tensor.dtype != group[0].dtype):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


SINGLE_PROCESS = World()


def join_world(name: str = "auto") -> tuple[World, torch.device]:
    """Joins the processes that torchrun or ``accelerate launch`` started; returns rank and number, and the device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS, pick_device(name)
    from accelerate import PartialState  # slow to import

    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available())
    return World(state.process_index, state.num_processes), state.device
