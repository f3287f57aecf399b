"""Randomness without state: every number is a function of (seed, step, update, shard, stream, count so far).

So a run can stop, resume, be replayed at any step or be split over processes, and uses the same numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor


class KeyedRandom:
    """The random numbers of one update of one step on one micro-batch (``shard`` counts these over all processes)."""

    def __init__(
        self, seed: int, step: int, update: str, shard: int, device: torch.device | str = "cpu", *, prefix: str = ""
    ) -> None:
        self.key = (seed, step, update, shard)
        self.device = torch.device(device)
        self._prefix = prefix
        self._count: Counter[str] = Counter()

    def stream(self, prefix: str) -> KeyedRandom:
        """Numbers of the same key under another name, from their start: two calls with the same name agree."""
        seed, step, update, shard = self.key
        return KeyedRandom(seed, step, update, shard, self.device, prefix=f"{self._prefix}{prefix}/")

    @property
    def shared(self) -> KeyedRandom:
        """Numbers that do not depend on the shard, for whatever shapes the graph (exit steps, list lengths)."""
        seed, step, update, _ = self.key
        return KeyedRandom(seed, step, update, -1, self.device, prefix=self._prefix)

    def _generator(self, stream: str, device: torch.device) -> torch.Generator:
        name = self._prefix + stream
        seed, step, update, shard = self.key
        key = f"{seed}/{step}/{update}/{shard}/{name}/{self._count[name]}"
        self._count[name] += 1
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, shape: tuple[int, ...] | torch.Size, stream: str = "noise") -> Tensor:
        """Standard normal float32 on the device."""
        generator = self._generator(stream, self.device)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

    def uniform(self, size: int, low: float = 0.0, high: float = 1.0, stream: str = "time") -> Tensor:
        """``size`` numbers in [low, high), float64 on the host, where schedules are evaluated."""
        generator = self._generator(stream, torch.device("cpu"))
        return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

    def integers(self, size: int, high: int, stream: str = "index") -> Tensor:
        """``size`` integers in [0, high), int64 on the host."""
        return torch.randint(high, (size,), generator=self._generator(stream, torch.device("cpu")))
