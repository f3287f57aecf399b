"""The changes of a config with which its run fits into the memory of a device, from the least to the most intrusive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from fewstep.core.errors import UserError
from fewstep.distill.config import Config
from fewstep.distill.memory import Costs, MemoryPlan, plan_memory
from fewstep.models.live_memory import EvaluationMemory

GiB = 2**30
MARGIN = 1.1  # for workspace inside operations, fragments of the allocator, and the driver
Change = Mapping[str, Any]  # dotted key of the config: value


@dataclass(frozen=True)
class Fit:
    """``overrides`` are those with which a run fits into ``gib``: none if it fits as it is, None if nothing helps.
    ``plan`` is that of the changed config, or of the last one tried."""

    gib: float
    overrides: tuple[str, ...] | None
    plan: MemoryPlan

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {"gib": self.gib, "overrides": self.overrides, "total": self.plan.total}


def changes(config: Config, devices: int = 1) -> Iterator[Change]:
    """What saves memory, in the order in which it is tried; each is added to those before.

    CUDA graphs come first: they cannot be combined with what saves memory. A smaller micro-batch, gradient
    checkpointing and split networks compute the same, more slowly. Adapters come last, because they are another way to
    train: their learning rates are higher.
    """
    if config.cuda_graphs:
        yield {"cuda_graphs": False}
    for batch in (config.batch // n for n in (2, 4, 8, 16, 32, 64, 128, 256) if config.batch % n == 0):
        yield {"batch": batch, "accumulate": config.accumulate * config.batch // batch}
    pipeline = config.model is None
    if not config.gradient_checkpointing and pipeline:
        yield {"gradient_checkpointing": True}
    if config.precision == "float32":
        if config.weights == "float32" and pipeline:
            yield {"precision": "bfloat16", "weights": "bfloat16"}  # which not every teacher can have
        yield {"precision": "bfloat16"}
    trained = [
        (f"stages.{k}.roles.{name}", r) for k, stage in enumerate(config.stages) for name, r in stage.roles.items()
    ]
    if devices > 1 and not config.shard:
        yield {"shard": True}
    if bits8 := {f"{key}.optimizer": "adamw8bit" for key, role in trained if role.optimizer == "adamw"}:
        yield bits8
    if not pipeline:
        return
    if config.adapters is None:
        if not config.offload:
            yield {"offload": True}
        yield {"adapters": {"rank": 64}, "offload": False}
    yield from ({"weights": bits} for bits in ("int8", "nf4") if config.weights != "nf4")


def changed(config: Config, applied: Sequence[Change]) -> Config:
    """The config with changes; later ones win. Raises ``ValidationError`` if they do not fit together."""
    raw = config.model_dump(mode="json")
    for key, value in _merged(applied).items():
        node: Any = raw
        *parents, last = key.split(".")
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        node[last] = value
    return Config.model_validate(raw)


def first_fit(config: Config, gib: float, devices: int, costs: Costs) -> Fit:
    """The config as it is, or with the first changes that suffice; of these, the ones that are needed."""
    limit = gib * GiB / MARGIN

    def plan(applied: Sequence[Change]) -> MemoryPlan | None:
        """None if the changes do not fit the config; activations are counted only if the rest fits."""
        try:
            trial = changed(config, applied)
            least = plan_memory(trial, devices, costs=_no_activations)
        except (UserError, ValidationError):
            return None
        return least if least.total > limit else plan_memory(trial, devices, costs=costs)

    applied: list[Change] = []
    found = plan_memory(config, devices, costs=costs)
    for change in () if found.total <= limit else changes(config, devices):
        trial = plan([*applied, change])
        if trial is not None:
            applied.append(change)
            found = trial
            if found.total <= limit:
                break
    if found.total > limit:
        return Fit(gib, None, found)
    for change in applied[-2::-1]:
        fewer = [other for other in applied if other is not change]
        without = plan(fewer)
        if without is not None and without.total <= limit:
            applied, found = fewer, without
    return Fit(gib, tuple(f"{key}={_text(value)}" for key, value in _merged(applied).items()), found)


def _no_activations(*_: object) -> EvaluationMemory:
    return EvaluationMemory(0, 0)


def _merged(applied: Sequence[Change]) -> dict[str, Any]:
    return {key: value for change in applied for key, value in change.items()}


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
