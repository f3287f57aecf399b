"""The training loop of all objectives. It runs updates on roles; what they compute is up to the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Source
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.roles import Roles
from fewstep.distill.update import MicroBatch, Objective, StudentSample, Update

CPU = torch.device("cpu")
PATIENCE = 20  # consecutive non-finite gradients of an update after which training stops


@dataclass
class Loop:
    """Runs the updates of one stage. ``batch`` is the size of a micro-batch, ``accumulate`` the number of them per
    process and update."""

    roles: Roles
    objective: Objective
    sources: Mapping[str, Source]
    batch: int
    accumulate: int = 1
    clip: float | None = None
    seed: int = 0
    device: torch.device = CPU
    world: World = SINGLE_PROCESS

    def __post_init__(self) -> None:
        self._skipped: dict[str, int] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """Runs all updates due at ``step``; returns their losses, metrics and gradient norms as 0-d tensors."""
        metrics: dict[str, Tensor] = {}
        shards = [self.world.rank + self.world.size * k for k in range(self.accumulate)]
        shared: dict[int, dict[str, StudentSample]] = {shard: {} for shard in shards}
        for update in self.objective.updates:
            if update.due(step):
                metrics.update(self.update(update, step, shared))
        return metrics

    def update(self, update: Update, step: int, shared: dict[int, dict[str, StudentSample]]) -> dict[str, Tensor]:
        """Runs one update at ``step``; ``shared`` holds, by shard, the samples that the updates of a step share."""
        parameters = [p for role in update.roles for p in self.roles[role].parameters]
        for parameter in parameters:
            parameter.grad = None
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        with self.roles.updating(update.roles):
            for shard, samples in shared.items():
                micro = self._micro_batch(update, step, shard, samples)
                for name, loss in update.terms(micro):
                    leaves = micro.shared.get("graph")
                    inputs = [*parameters, *({leaves.x, leaves.output} if leaves else ())]
                    (loss / self.accumulate).backward(inputs=inputs)
                    micro.log(f"loss/{name}", loss)
                micro.finish(parameters)
                for name, (value, count) in micro.metrics.items():
                    before = sums.get(name, (0, 0))
                    sums[name] = before[0] + value, before[1] + count
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise RuntimeError(
                f"the update {update.name!r} reached no parameter of {', '.join(update.roles)}: "
                "is through=True missing in an evaluation between the loss and the student?"
            )
        self.world.mean_(gradients)
        self.world.mean_([part for pair in sums.values() for part in pair])
        metrics = {name: value / count for name, (value, count) in sums.items()}
        limit = self.clip if self.clip is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        metrics[f"grad_norm/{update.name}"] = norm.detach()
        if self._is_finite(update, norm, step):
            for role in update.roles:
                self.roles[role].step()
            if update.after is not None:
                update.after(KeyedRandom(self.seed, step, f"after/{update.name}", 0, self.device))
        return metrics

    def _micro_batch(self, update: Update, step: int, shard: int, shared: dict[str, StudentSample]) -> MicroBatch:
        batches = {
            name: source(KeyedRandom(self.seed, step, f"data/{name}", shard), self.batch).to(self.device)
            for name, source in self.sources.items()
        }
        random = KeyedRandom(self.seed, step, update.name, shard, self.device)
        return MicroBatch(batches, random, step, self.roles, self.objective.rollout, shared)

    def _is_finite(self, update: Update, norm: Tensor, step: int) -> bool:
        """Whether the update can be applied. Raises ``UserError`` after ``PATIENCE`` skipped updates in a row."""
        if torch.isfinite(norm):
            self._skipped[update.name] = 0
            return True
        self._skipped[update.name] = self._skipped.get(update.name, 0) + 1
        if self._skipped[update.name] >= PATIENCE:
            raise UserError(
                f"The update {update.name!r} (of {', '.join(update.roles)}) had no finite gradient for {PATIENCE} "
                f"steps in a row, up to step {step}. Lower its learning rate or the guidance; the last checkpoint is "
                "intact."
            )
        return False
