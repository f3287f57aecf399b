"""The one training loop. It knows updates and roles; what they compute is the objective's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Source
from fewstep.distill.processes import ALONE, World
from fewstep.distill.roles import Roles
from fewstep.distill.update import MicroBatch, Objective, StudentSample, Update

CPU = torch.device("cpu")
PATIENCE = 20  # consecutive steps that an update may lose to non-finite gradients before the run is stopped


@dataclass
class Loop:
    """Runs the updates of one stage. ``batch`` is the size of a micro-shard, ``accumulate`` their number a process."""

    roles: Roles
    objective: Objective
    sources: Mapping[str, Source]
    batch: int
    accumulate: int = 1
    clip: float | None = None
    seed: int = 0
    device: torch.device = CPU
    world: World = ALONE

    def __post_init__(self) -> None:
        self._lost: dict[str, int] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """All updates that are due at ``step``; returns their losses, notes and gradient norms, as 0-d tensors."""
        metrics: dict[str, Tensor] = {}
        shards = [self.world.rank + self.world.size * k for k in range(self.accumulate)]
        shared: dict[int, dict[str, StudentSample]] = {shard: {} for shard in shards}
        for update in self.objective.updates:
            if update.due(step):
                metrics.update(self.update(update, step, shared))
        return metrics

    def update(self, update: Update, step: int, shared: dict[int, dict[str, StudentSample]]) -> dict[str, Tensor]:
        """One update at ``step``; ``shared`` holds what a step's updates share of each micro-shard's sample."""
        parameters = [p for role in update.roles for p in self.roles[role].parameters]
        for parameter in parameters:
            parameter.grad = None
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        with self.roles.updating(update.roles):
            for shard, anchors in shared.items():
                micro = self._micro(update, step, shard, anchors)
                for name, loss in update.terms(micro):
                    leaves = micro.shared.get("graph")
                    inputs = [*parameters, *({leaves.x, leaves.output} if leaves else ())]
                    (loss / self.accumulate).backward(inputs=inputs)
                    micro.log(f"loss/{name}", loss)
                micro.finish(parameters)
                for name, (value, among) in micro.metrics.items():
                    before = sums.get(name, (0, 0))
                    sums[name] = before[0] + value, before[1] + among
        reached = [p.grad for p in parameters if p.grad is not None]
        if not reached:
            raise RuntimeError(
                f"the update {update.name!r} reached no parameter of {', '.join(update.roles)}: "
                "does a read between the loss and the student lack through=True?"
            )
        self.world.mean_(reached)
        self.world.mean_([part for pair in sums.values() for part in pair])
        seen = {name: value / among for name, (value, among) in sums.items()}
        limit = self.clip if self.clip is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        seen[f"grad_norm/{update.name}"] = norm.detach()
        if self._finite(update, norm, step):
            for role in update.roles:
                self.roles[role].step()
            if update.after is not None:
                update.after(KeyedRandom(self.seed, step, f"after/{update.name}", 0, self.device))
        return seen

    def _micro(self, update: Update, step: int, shard: int, shared: dict[str, StudentSample]) -> MicroBatch:
        batches = {
            name: source(KeyedRandom(self.seed, step, f"data/{name}", shard), self.batch).to(self.device)
            for name, source in self.sources.items()
        }
        random = KeyedRandom(self.seed, step, update.name, shard, self.device)
        return MicroBatch(batches, random, step, self.roles, self.objective.rollout, shared)

    def _finite(self, update: Update, norm: Tensor, step: int) -> bool:
        """Skips an update whose gradient is not finite, and gives up when that has become the rule."""
        if torch.isfinite(norm):
            self._lost[update.name] = 0
            return True
        self._lost[update.name] = self._lost.get(update.name, 0) + 1
        if self._lost[update.name] >= PATIENCE:
            raise UserError(
                f"The update {update.name!r} (of {', '.join(update.roles)}) had no finite gradient for {PATIENCE} "
                f"steps running, up to {step}. Lower its learning rate or the guidance; the last checkpoint is intact."
            )
        return False
