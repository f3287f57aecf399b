"""What happens in the steps of a stage: the evaluations, the graphs alive beside them, the gradients held.

It is observed in the training loop with stand-in networks, so that it is what training does.
"""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.distill.explain import BATCH, CYCLES
from fewstep.distill.trainer import Trainer
from fewstep.distill.update import StudentSample
from fewstep.models.denoiser import Denoiser
from fewstep.models.live_memory import Graph


class Evaluated(NamedTuple):
    """An evaluation of a role on ``batches`` micro-batches at once (2 with guidance), or of all frames of clips, one
    after the other."""

    role: str
    batches: int
    graph: Graph
    by_frame: bool = False


class Snapshot(NamedTuple):
    """An evaluation in an update, with the graphs alive and the roles that hold gradients then."""

    update: str
    evaluation: Evaluated
    alive: tuple[Evaluated, ...]
    gradients: frozenset[str]


class _Keep(torch.autograd.Function):
    """The identity; it saves a marker that lives until the backward pass, as activations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: Tensor) -> Tensor:
        ctx.save_for_backward(marker)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def snapshots(trainer: Trainer) -> frozenset[Snapshot]:
    """The different evaluations in some cycles of the current stage of a trainer with stand-in networks."""
    roles, found, alive = trainer.roles, set[Snapshot](), list[tuple[Evaluated, weakref.ref[Tensor]]]()
    current = ""

    def hook(
        role: str, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor
    ) -> Tensor:
        graph: Graph = "none" if not output.requires_grad else "parameters" if roles.is_updating(role) else "input"
        evaluation = Evaluated(role, math.ceil(len(inputs[0]) / BATCH), graph, bool(options))
        others = [other for other, marker in alive if marker() is not None]
        if evaluation.by_frame:  # in its memory that of all frames is counted
            others = [other for other in others if not other.by_frame]
        held = frozenset(name for name, other in roles.items() if any(p.grad is not None for p in other.parameters))
        found.add(Snapshot(current, evaluation, tuple(sorted(others)), held))
        if graph == "none":
            return output
        marker = torch.empty(())
        alive.append((evaluation, weakref.ref(marker)))
        kept: Tensor = _Keep.apply(output, marker)
        return kept

    denoisers = {name: role.module for name, role in roles.items() if isinstance(role.module, Denoiser)}
    handles = [
        module.backbone.register_forward_hook(partial(hook, name), with_kwargs=True)
        for name, module in denoisers.items()
    ]
    updates = trainer.objective.updates
    shards = range(trainer.loop.accumulate)
    try:
        for step in range(CYCLES * max(update.due.n for update in updates)):
            shared: dict[int, dict[str, StudentSample]] = {shard: {} for shard in shards}
            for update in updates:
                if update.due(step):
                    current = update.name
                    trainer.loop.update(update, step, shared)
                    alive.clear()
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)
