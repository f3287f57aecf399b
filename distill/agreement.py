"""What must be the same in all processes of a run: with another setting, weight or batch in one of them, each would
train a network of its own, and nothing would say so."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config import Config
from fewstep.distill.processes import World
from fewstep.distill.resume import flat_settings
from fewstep.distill.sharding import is_sharded

if TYPE_CHECKING:
    from fewstep.distill.trainer import Trainer

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def require_same_settings(world: World, config: Config, resumed: bool) -> None:
    """Raises ``UserError`` if a process has other settings, or another version of fewstep or torch. The folder of the
    run may differ: only the first process writes there."""
    settings = {name: value for name, value in flat_settings(config.model_dump(mode="json")) if name != "out"}
    versions = {"version of fewstep": version("fewstep"), "version of torch": torch.__version__}
    world.require_same(settings | versions | {"--resume": resumed})


def require_same_inputs(trainer: Trainer) -> None:
    """Raises ``UserError`` if a process has another teacher or network to start from, other data (of which it compares
    one micro-batch), or another state to train from."""
    if trainer.world.size == 1:
        return
    inputs, config = trainer.inputs, trainer.config
    found: dict[str, object] = {"teacher's weights": inputs.teacher_sha256}
    found |= {f"weights of networks.{name}": sha256 for name, sha256 in inputs.networks_sha256.items()}
    found["class names"] = inputs.model_config.class_names
    for name, source in inputs.sources.items():
        batch = source(KeyedRandom(config.seed, 0, f"data/{name}", 0), config.batch)
        nulls = {f"null {key}": value for key, value in batch.condition.nulls.items()}
        tensors = {**batch, **batch.condition, **nulls}
        found |= {f"data ({key} of {name})": value for key, value in fingerprints(tensors).items()}
    trainer.world.require_same(found)
    require_same_state(trainer)


def require_same_state(trainer: Trainer) -> None:
    """Raises ``UserError`` if a process would continue from other weights, averages or moments. Of networks that are
    split over the processes each has other rows, which cannot be compared."""
    if trainer.world.size > 1:
        whole = {name: tensor for name, tensor in trainer.state()[0].items() if not is_sharded(tensor)}
        trainer.world.require_same(fingerprints(whole) | {"step": trainer.step})


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Shape, type and the sum of the bits of each tensor, which is exact in any order of addition."""
    sums: list[Tensor] = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().reshape(-1)
        bits = bits.view(INTEGERS[bits.element_size()]) if bits.is_floating_point() else bits
        sums.append(bits.sum(dtype=torch.int64).cpu())
    described = zip(tensors.items(), sums, strict=True)
    return {name: f"{tensor.dtype} {list(tensor.shape)}, {total.item()}" for (name, tensor), total in described}
