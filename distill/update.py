"""The parts of an objective: its updates, their loss terms, and the micro-batch that a term receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.distill.roles import Roles
from fewstep.models.condition import Condition
from fewstep.models.model_config import FewStep


@dataclass(frozen=True)
class Every:
    """The steps 0, n, 2n, ... at which an update is due."""

    n: int = 1

    def count(self, first: int, last: int) -> int:
        """How often it is due in ``first`` .. ``last - 1``."""
        return sum(self(step) for step in range(first, last))

    def __call__(self, step: int) -> bool:
        return step % self.n == 0


class LossTerm(NamedTuple):
    """A named scalar loss. The loop back-propagates it before it requests the next one."""

    name: str
    loss: Tensor


class LastStep(NamedTuple):
    """The state ``x`` [B, ...] from which the student predicted its sample, without a graph, and ``evaluate(x, t)``,
    its x0 at another state and time [B], for the same conditions and earlier frames."""

    x: Tensor
    evaluate: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StudentSample:
    """The student's sample, as objectives use it.

    ``x`` [B, ...] at noise level ``level`` [B] (0 is clean) must have the teacher's distribution; it is what is
    re-noised. ``output`` is the tensor that receives the gradient: ``x`` itself, or the ``x0`` that it came from.
    ``t_student`` [B] is the time at which the student was evaluated, ``noise`` the noise that its prediction implies,
    without a graph. ``last`` is known of rollouts that end with a prediction of x0.
    """

    x: Tensor
    level: Tensor
    output: Tensor
    t_student: Tensor
    condition: Condition
    noise: Tensor | None = None
    last: LastStep | None = None

    def leaves(self, graph: bool) -> StudentSample:
        """The same values, detached from their graph; with ``graph``, as leaves that collect gradients, else without
        ``last``, of which only a student's update makes use."""
        x = self.x.detach().requires_grad_(graph)
        output = x if self.output is self.x else self.output.detach().requires_grad_(graph)
        return replace(self, x=x, output=output, last=self.last if graph else None)


Rollout = Callable[["MicroBatch"], StudentSample]


@dataclass
class MicroBatch:
    """One micro-batch of one update: batches by source name, random numbers, the student's sample, and metrics.

    ``sample`` is the result of the objective's rollout. It is the same in all updates of a step, and collects gradients
    only in the one that trains the student. Its graph is cut there: terms are back-propagated one by one, each freeing
    its memory, and ``backward_rollout`` back-propagates the collected gradients through the student once.
    """

    batches: Mapping[str, Batch]
    random: KeyedRandom
    step: int
    roles: Roles
    rollout: Rollout | None = None
    shared: dict[str, StudentSample] = field(default_factory=dict)  # shared by all updates of a step
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    _with_graph: StudentSample | None = None

    @property
    def batch(self) -> Batch:
        """The batch of the main source, ``data``."""
        return self.batches["data"]

    @property
    def first_sample(self) -> int:
        """The number of its first sample in the whole batch, over all micro-batches and processes."""
        return self.random.key[3] * self.batch.size

    @property
    def sample(self) -> StudentSample:
        """The student's sample. Raises ``ValueError`` if the objective has no rollout."""
        graph = self.roles.is_updating("student") and torch.is_grad_enabled()
        if graph and self._with_graph is None:
            self._with_graph = self._run_rollout()
            self.shared["graph"] = self._with_graph.leaves(True)
            self.shared["plain"] = self._with_graph.leaves(False)
        if not graph and "plain" not in self.shared:
            with torch.no_grad():
                self.shared["plain"] = self._run_rollout().leaves(False)
        return self.shared["graph" if graph else "plain"]

    def _run_rollout(self) -> StudentSample:
        """Runs the rollout with its own random numbers, so that every update of the step gets the same sample."""
        if self.rollout is None:
            raise ValueError("this objective has no rollout, so its terms have no sample")
        seed, step, _, shard = self.random.key
        return self.rollout(replace(self, random=KeyedRandom(seed, step, "rollout", shard, self.random.device)))

    def backward_rollout(self) -> None:
        """Back-propagates the gradients that the terms left on the sample through the rollout."""
        if self._with_graph is None:
            return
        leaf = self.shared.pop("graph")
        ends = {self._with_graph.x: leaf.x.grad, self._with_graph.output: leaf.output.grad}
        used = [(tensor, grad) for tensor, grad in ends.items() if grad is not None]
        if used:
            torch.autograd.backward([t for t, _ in used], [g for _, g in used])
        self._with_graph = None

    def log(self, name: str, value: Tensor, count: Tensor | None = None) -> None:
        """Records a metric. ``sum(value) / sum(count)`` over all shards is logged, by default the mean."""
        value = value.detach().float()
        count = torch.ones_like(value) if count is None else count.detach().to(value)
        self.metrics[name] = value.sum(), count.sum()

    def total(self, name: str, value: Tensor) -> None:
        """Records a statistic [...]: ``Update.after`` receives its sum over all micro-batches and processes."""
        self.totals[name] = value.detach()


After = Callable[[KeyedRandom, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Update:
    """One optimizer step of some roles. ``after`` runs when it is done, with random numbers that all processes share
    and the totals of its micro-batches (to move the fake towards the student, to refill a buffer from the policy, or to
    update a statistic over many batches). After an update that the device skipped, it runs with totals of 0."""

    name: str
    roles: tuple[str, ...]
    terms: Callable[[MicroBatch], Iterator[LossTerm]]
    due: Every = Every()
    after: After | None = None


@dataclass(frozen=True)
class Objective:
    """A method: its updates in order, the rollout that produces their sample, and how the trained model is sampled.

    ``state`` holds tensors that checkpoints must contain besides the roles (a buffer that the policy refills); they are
    saved, and restored in place. ``few_step`` is the student's sampling rule; None keeps the previous one. ``experts``
    lists (role, lowest time), noisiest first, if the generator is not the student alone. ``backbone`` holds settings of
    the student's network that differ from the teacher's.
    """

    updates: tuple[Update, ...]
    rollout: Rollout | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    few_step: FewStep | None = None
    experts: tuple[tuple[str, float], ...] = (("student", 0.0),)
    backbone: dict[str, Any] = field(default_factory=dict)
