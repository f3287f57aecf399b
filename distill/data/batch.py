"""Batches, and the interface of data sources.

A source is a function of keyed random numbers. It has no position to save: any step's batch can be recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.registry import Registry
from fewstep.core.transfer import send
from fewstep.models.condition import Condition


@dataclass(frozen=True)
class Batch(Mapping[str, Tensor]):
    """``size`` samples of ``shape`` each: their condition, and tensors by name (``x0``; ``winner`` and ``loser``)."""

    size: int
    shape: tuple[int, ...]
    condition: Condition
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def to(self, device: torch.device) -> Batch:
        tensors = {name: send(value, device) for name, value in self.tensors.items()}
        return Batch(self.size, self.shape, self.condition.to(device), tensors)


class Source(Protocol):
    """Returns the batch of ``size`` samples that belongs to the key of ``random``."""

    def __call__(self, random: KeyedRandom, size: int) -> Batch: ...


SOURCES: Registry[Callable[..., Source]] = Registry("data", dict, callable, "a class or function that returns a source")
