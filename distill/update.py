"""What an objective is made of: updates, their terms, and the micro-batch a term sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.distill.data import Batch
from fewstep.distill.draws import Draws
from fewstep.distill.roles import Roles
from fewstep.models.condition import Condition
from fewstep.models.store import FewStep


@dataclass(frozen=True)
class Due:
    """The steps at which an update happens: ``start + offset, start + offset + every, ...``."""

    every: int = 1
    offset: int = 0
    start: int = 0

    def count(self, first: int, last: int) -> int:
        """How often it is due in ``first`` .. ``last - 1``."""
        return sum(self(step) for step in range(first, last))

    def __call__(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == self.offset


class Term(NamedTuple):
    """A named scalar loss. The loop back-propagates it before it asks for the next one."""

    name: str
    loss: Tensor


@dataclass(frozen=True)
class Anchor:
    """The student's sample as a method sees it.

    ``x`` [B, ...] at noise level ``s`` [B] (0 is clean) is what must have the teacher's law and what is re-noised;
    ``handle`` is the tensor that is pulled (``x`` itself or the ``x0`` it came from); ``t_in`` [B] is the time at which
    the student was read; ``mask`` (broadcastable to ``x``) marks what counts; ``noise`` is the noise that the student's
    prediction implies, without a graph.
    """

    x: Tensor
    s: Tensor
    handle: Tensor
    t_in: Tensor
    condition: Condition
    mask: Tensor | None = None
    noise: Tensor | None = None

    def leaves(self, graph: bool) -> Anchor:
        """The same values cut off from the graph they came from; with ``graph``, as leaves that collect gradients."""
        x = self.x.detach().requires_grad_(graph)
        handle = x if self.handle is self.x else self.handle.detach().requires_grad_(graph)
        return replace(self, x=x, handle=handle)


Rollout = Callable[["Micro"], Anchor]


@dataclass
class Micro:
    """One micro-shard of one update: its batches by source name, its draws, its sample, and its notes.

    ``sample`` is the anchor of the objective's rollout: the same for every update of a step, with gradients in the one
    that trains the student and without in the others. Its graph is cut at the anchor: terms may be back-propagated one
    by one, each freeing its memory, and ``finish`` carries what they collected into the student once.
    """

    batches: Mapping[str, Batch]
    draws: Draws
    step: int
    roles: Roles
    rollout: Rollout | None = None
    kept: dict[str, Anchor] = field(default_factory=dict)
    notes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _source: Anchor | None = None

    @property
    def batch(self) -> Batch:
        """The batch of the main source, ``data``."""
        return self.batches["data"]

    @property
    def sample(self) -> Anchor:
        if self.rollout is None:
            raise ValueError("this objective has no rollout, so its terms have no sample")
        graph = self.roles.is_updating("student") and torch.is_grad_enabled()
        if graph and self._source is None:
            seed, step, _, shard = self.draws.key
            with_own_draws = replace(self, draws=Draws(seed, step, "rollout", shard, self.draws.device))
            self._source = self.rollout(with_own_draws)
            self.kept["graph"] = self._source.leaves(True)
            self.kept["plain"] = self._source.leaves(False)
        if not graph and "plain" not in self.kept:
            seed, step, _, shard = self.draws.key
            with_own_draws = replace(self, draws=Draws(seed, step, "rollout", shard, self.draws.device))
            with torch.no_grad():
                self.kept["plain"] = self.rollout(with_own_draws).leaves(False)
        return self.kept["graph" if graph else "plain"]

    def finish(self, parameters: list[torch.nn.Parameter]) -> None:
        """Back-propagates what the terms left on the sample's leaves through the rollout."""
        if self._source is None:
            return
        leaf = self.kept.pop("graph")
        ends = {self._source.x: leaf.x.grad, self._source.handle: leaf.handle.grad}
        used = [(tensor, grad) for tensor, grad in ends.items() if grad is not None]
        if used:
            torch.autograd.backward([t for t, _ in used], [g for _, g in used], inputs=parameters)
        self._source = None

    def note(self, name: str, value: Tensor, among: Tensor | None = None) -> None:
        """Records a diagnostic: what is logged is ``sum(value) / sum(among)`` over all shards, by default the mean."""
        value = value.detach().float()
        among = torch.ones_like(value) if among is None else among.detach().to(value)
        self.notes[name] = value.sum(), among.sum()


@dataclass(frozen=True)
class Update:
    """One optimizer step of some roles. ``after`` runs once it is done, with draws of its own that every process shares
    (a fake <- student blend, a refill of a buffer by the policy)."""

    name: str
    roles: tuple[str, ...]
    terms: Callable[[Micro], Iterator[Term]]
    due: Due = Due()
    after: Callable[[Draws], None] | None = None


@dataclass(frozen=True)
class Objective:
    """A method: its updates in order, the rollout that makes their sample, and how what it trains is sampled.

    ``state`` names tensors that must survive a checkpoint besides the roles (a buffer that the policy refills); they
    are saved and restored in place. ``few_step`` is how its student is sampled; None leaves that as it was. ``experts``
    lists (role, lowest time) from noise downwards where the generator is not the student alone. ``backbone`` holds
    settings of the student's network that differ from the teacher's.
    """

    updates: tuple[Update, ...]
    rollout: Rollout | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    few_step: FewStep | None = None
    experts: tuple[tuple[str, float], ...] = (("student", 0.0),)
    backbone: dict[str, Any] = field(default_factory=dict)
