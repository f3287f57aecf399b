"""The training loop of all objectives. It runs updates on roles; what they compute is up to the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fewstep.core.devices import CPU
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import sharding
from fewstep.distill.data.batch import Batch, Source
from fewstep.distill.nonfinite import locate
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.roles import Roles
from fewstep.distill.update import MicroBatch, Objective, StudentSample, Update
from fewstep.models.attention import without_cudnn

MAX_LOST = 20  # updates of one kind lost in a row, after which training stops
READ_EVERY = 100  # steps: by then the host reads what the device skipped, however rarely a run logs


@dataclass(frozen=True)
class LostUpdate:
    """An update that was not applied at ``step`` (counted from 1, as in the log), because its gradient was not
    finite."""

    update: str
    step: int
    cause: str

    def __str__(self) -> str:
        return f"The update {self.update!r} of step {self.step} was not applied: {self.cause}."


@dataclass(frozen=True)
class Skippable:
    """An update that the device skipped if ``lost``, a 0-d tensor there, is 1. The host has not read it yet."""

    update: Update
    step: int
    metrics: Mapping[str, Tensor]
    lost: Tensor


@dataclass
class Loop:
    """Runs the updates of one stage. ``batch`` is the size of a micro-batch, ``accumulate`` the number of them per
    update, which the processes share equally.

    An update without a finite gradient is not applied. ``lost`` lists those that were found since the last step began.
    Training stops when an update is lost ``max_lost`` times in a row (by default ``MAX_LOST``). An optimizer that can
    skip a step on the device (``Role.skips``) does so; the host reads only every ``read_every`` steps what was skipped.

    Raises ``UserError`` if the processes cannot share the micro-batches equally.
    """

    roles: Roles
    objective: Objective
    sources: Mapping[str, Source]
    batch: int
    accumulate: int = 1
    clip: float | None = None
    seed: int = 0
    device: torch.device = CPU
    world: World = SINGLE_PROCESS
    max_lost: Mapping[str, int] = field(default_factory=dict)
    read_every: int = 1
    lost: list[LostUpdate] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.accumulate % self.world.size:
            raise UserError(
                f"accumulate = {self.accumulate}: the {self.world.size} processes share the micro-batches of an "
                f"update, so it must be a multiple of {self.world.size}. Start {_divisors(self.accumulate)} of them, "
                f"or train a new run with accumulate={self.world.size}."
            )
        self._in_a_row: dict[str, int] = {}
        self._unread: list[Skippable] = []
        self._batches: dict[int, Mapping[str, Batch]] = {}  # of one step, by shard, in host memory
        self._batches_step = -1

    def step(self, step: int) -> dict[str, Tensor]:
        """Runs all updates due at ``step``; returns their losses, metrics and gradient norms as 0-d tensors."""
        metrics: dict[str, Tensor] = {}
        shared: dict[int, dict[str, StudentSample]] = {shard: {} for shard in self._shards}
        self.lost = []
        with without_cudnn(self.device):
            for update in self.objective.updates:
                if update.due(step):
                    metrics.update(self.update(update, step, shared))
        if (step + 1) % self.read_every == 0:
            self._read_skipped()
        return metrics

    @property
    def sound(self) -> bool:
        """Whether the latest update of each kind was applied."""
        self._read_skipped()
        return not any(self._in_a_row.values())

    def update(self, update: Update, step: int, shared: dict[int, dict[str, StudentSample]]) -> dict[str, Tensor]:
        """Runs one update at ``step``; ``shared`` holds, by shard, the samples that the updates of a step share."""
        parameters = [p for role in update.roles for p in self.roles[role].parameters]
        metrics, totals = self._gradients(update, step, shared)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise RuntimeError(
                f"the update {update.name!r} reached no parameter of {', '.join(update.roles)}: "
                "is input_grad=True missing in an evaluation between the loss and the student?"
            )
        self.world.mean_([gradient for gradient in gradients if not sharding.is_sharded(gradient)])
        norm = sharding.gradient_norm(parameters, lambda x: self.world.sum_([x]))
        metrics[f"grad_norm/{update.name}"] = norm.detach()
        lost = (~torch.isfinite(norm)).float()
        if skipped_there := all(self.roles[role].skips for role in update.roles):
            self._unread.append(Skippable(update, step, metrics, lost))
            totals = {name: torch.where(lost > 0, 0, total) for name, total in totals.items()}
        elif lost:
            self._add_lost(update, step, self._cause(update, metrics))
            return metrics
        else:
            self._in_a_row[update.name] = 0
        if self.clip is not None:
            sharding.clip_gradients(parameters, self.clip, norm)
        for role in update.roles:
            self.roles[role].step(lost if skipped_there else None)
        if update.after is not None:
            update.after(KeyedRandom(self.seed, step, f"after/{update.name}", 0, self.device), totals)
        return metrics

    def _gradients(
        self, update: Update, step: int, shared: dict[int, dict[str, StudentSample]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leaves the gradients of this process's micro-batches on the parameters; returns metrics and totals of all."""
        for role in self.roles.values():  # also those of the update before, whose memory this one can use
            for parameter in role.parameters:
                parameter.grad = None
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        totals: dict[str, Tensor] = {}
        with self.roles.updating(update.roles):
            for shard, samples in shared.items():
                micro = self._micro_batch(update, step, shard, samples)
                for name, loss in update.terms(micro):
                    (loss / len(shared)).backward()
                    micro.log(f"loss/{name}", loss)
                micro.backward_rollout()
                for name, (value, count) in micro.metrics.items():
                    before = sums.get(name, (0, 0))
                    sums[name] = before[0] + value, before[1] + count
                for name, value in micro.totals.items():
                    totals[name] = totals[name] + value if name in totals else value
        for name in update.roles:
            self.roles[name].add_missing_gradients()
        self._align(update, sums, totals)
        self.world.mean_([part for pair in sums.values() for part in pair])
        self.world.sum_(list(totals.values()))
        return {name: value / count for name, (value, count) in sums.items()}, totals

    def _align(self, update: Update, sums: dict[str, tuple[Tensor, Tensor]], totals: dict[str, Tensor]) -> None:
        """Adds zeros for the gradients, metrics and totals that only micro-batches of other processes have, and brings
        them into one order: lists of them are added up over the processes."""
        if self.world.size == 1:
            return
        parameters = [p for role in update.roles for p in self.roles[role].parameters]
        kinds = {name: (tuple(total.shape), str(total.dtype)) for name, total in totals.items()}
        own = ([p.grad is not None for p in parameters], list(sums), kinds)
        every = self.world.gather_if_different(own)
        if len(every) == 1:
            return
        for parameter, *there in zip(parameters, *(reached for reached, _, _ in every), strict=True):
            if parameter.grad is None and any(there):
                parameter.grad = torch.zeros_like(parameter)
        for name in dict.fromkeys(name for _, names, _ in every for name in names):
            value, count = torch.zeros(2, device=self.device)
            sums[name] = sums.pop(name, (value, count))
        for name, (shape, dtype) in {name: kind for _, _, kinds in every for name, kind in kinds.items()}.items():
            empty = torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=self.device)
            totals[name] = totals.pop(name, empty)

    @property
    def _shards(self) -> range:
        """The micro-batches of this process."""
        return range(self.world.rank, self.accumulate, self.world.size)

    def _micro_batch(self, update: Update, step: int, shard: int, shared: dict[str, StudentSample]) -> MicroBatch:
        if step != self._batches_step:
            self._batches, self._batches_step = {}, step
        if shard not in self._batches:
            self._batches[shard] = {
                name: source(KeyedRandom(self.seed, step, f"data/{name}", shard), self.batch)
                for name, source in self.sources.items()
            }
        batches = {name: batch.to(self.device) for name, batch in self._batches[shard].items()}
        random = KeyedRandom(self.seed, step, update.name, shard, self.device)
        return MicroBatch(batches, random, step, self.roles, self.objective.rollout, shared)

    def _read_skipped(self) -> None:
        """Reads which updates the device skipped; adds them to ``lost``."""
        unread, self._unread = self._unread, []
        flags = torch.stack([one.lost for one in unread]).cpu().tolist() if unread else []
        for one, lost in zip(unread, flags, strict=True):
            if lost:
                losses = _not_finite(one.metrics)
                self._add_lost(one.update, one.step, losses or "its losses are finite, but not its gradient")
            else:
                self._in_a_row[one.update.name] = 0

    def _add_lost(self, update: Update, step: int, cause: str) -> None:
        """Adds an update to ``lost``. Raises ``UserError`` after too many lost updates in a row."""
        if not self._in_a_row.get(update.name) and (origin := self._origin(update, step)):
            cause = f"{cause}; {origin}"
        self.lost.append(LostUpdate(update.name, step + 1, cause))
        self._in_a_row[update.name] = self._in_a_row.get(update.name, 0) + 1
        if self._in_a_row[update.name] >= self.max_lost.get(update.name, MAX_LOST):
            raise UserError(
                f"{self.lost[-1]} It had no finite gradient {self._in_a_row[update.name]} times in a row. No "
                f"checkpoint has such numbers: --resume with a lower learning rate of {', '.join(update.roles)}, or "
                "train a new run with less guidance."
            )

    def _origin(self, update: Update, step: int) -> str | None:
        """The layer and sample of the first number that is not finite, found by repeating the update."""
        evaluations = self.roles.evaluations
        repeat = partial(self._gradients, update, step, {shard: {} for shard in self._shards})
        with without_cudnn(self.device), self.roles.without_recordings():
            found = self.world.gather(locate(self.roles, repeat, self.batch))
        self.roles.evaluations = evaluations
        return next((text for text in found if text is not None), None)

    def _cause(self, update: Update, metrics: Mapping[str, Tensor]) -> str:
        """What is not finite: losses, or else the gradients of parameters, or else only their norm."""
        if losses := _not_finite(metrics):
            return losses
        parameters = [
            f"{role}.{name}"
            for role in update.roles
            for name, parameter in self.roles[role].module.named_parameters()
            if parameter.grad is not None and not sharding.local(parameter.grad).isfinite().all()
        ]
        if not parameters:
            return "the norm of its gradient overflows"
        others = f" and of {len(parameters) - 1} other parameters" if len(parameters) > 1 else ""
        return f"its losses are finite, but not the gradient of {parameters[0]}{others}"


def _divisors(number: int) -> str:
    """The divisors of a number, in words."""
    *others, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(others)} or {last}" if others else last


def _not_finite(metrics: Mapping[str, Tensor]) -> str:
    """The losses that are not finite, in words; empty if there are none."""
    losses = [f"{name} is {value.item()}" for name, value in metrics.items() if name.startswith("loss/")]
    return " and ".join(text for text in losses if text.endswith(("nan", "inf")))
