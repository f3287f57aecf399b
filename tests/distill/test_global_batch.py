"""A batch is the same however it is divided into micro-batches: 1 x 32, 4 x 8 and 32 x 1 give the same gradients.

Random numbers are keyed by the number of the sample in the whole batch here, not by the micro-batch. Any statistic of a
micro-batch then shows, and any draw that should be spread over the whole batch but is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CASES, settings
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.trainer import Trainer

WHOLE = 32
STEPS = 3


def keyed_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(random: KeyedRandom, size: int, stream: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        seed, step, update, shard = random.key
        name = random._prefix + stream
        count = random._count[name]
        random._count[name] += 1
        first = 0 if shard < 0 else shard * size
        numbers = []
        for number in range(first, first + size):
            key = f"{seed}/{step}/{update}/{shard < 0}/{number}/{name}/{count}".encode()
            digest = hashlib.blake2b(key, digest_size=7).digest()
            numbers.append(draw(torch.Generator().manual_seed(int.from_bytes(digest, "little"))))
        return torch.stack(numbers)

    def normal(self: KeyedRandom, shape: tuple[int, ...], stream: str = "noise") -> Tensor:
        return rows(self, shape[0], stream, lambda g: torch.randn(tuple(shape[1:]), generator=g))

    def uniform(self: KeyedRandom, size: int, low: float = 0.0, high: float = 1.0, stream: str = "time") -> Tensor:
        u = rows(self, size, stream, lambda g: torch.rand((), generator=g, dtype=torch.float64))
        return low + (high - low) * u

    def integers(self: KeyedRandom, size: int, high: int, stream: str = "index") -> Tensor:
        return rows(self, size, stream, lambda g: torch.randint(high, (), generator=g))

    for function in (normal, uniform, integers):
        monkeypatch.setattr(KeyedRandom, function.__name__, function)


def gradients(raw: dict[str, Any], batch: int) -> list[dict[str, Tensor]]:
    """Of all trained roles in each of the first steps."""
    config = parse_config(raw | {"batch": batch, "accumulate": WHOLE // batch}, "test")
    trainer = Trainer(config, build_inputs(config, torch.device("cpu")), torch.device("cpu"))
    found = []
    for step in range(STEPS):
        trainer.loop.step(step)
        found.append(
            {
                f"{role}.{name}": parameter.grad.clone()
                for role in config.stages[0].roles
                for name, parameter in trainer.roles[role].module.named_parameters()
                if parameter.grad is not None
            }
        )
    return found


@pytest.mark.parametrize(("objective", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_gradients_do_not_depend_on_the_size_of_a_micro_batch(
    objective: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)  # some tiny runs have random data
    raw = settings(objective, tmp_path, "cpu", "float32", **changes)
    raw |= {"health": {"every": 0}}
    raw["stages"][0]["clip"] = None
    for role in raw["stages"][0]["roles"].values():
        role["lr"] = 1e-7  # Adam would magnify differences in rounding
    keyed_by_sample(monkeypatch)
    whole = gradients(raw, WHOLE)
    for batch in (8, 1):
        for a, b in zip(gradients(raw, batch), whole, strict=True):
            assert a.keys() == b.keys()
            scale = max(value.abs().max().item() for value in b.values())
            for name in b:
                assert (a[name] - b[name]).abs().max().item() < 5e-5 * scale, (batch, name)
