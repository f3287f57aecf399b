"""The loop of every multistep rule: DPM-Solver++ M, SDE-DPM-Solver++, UniPC, DC-Solver, and any mixture of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.samplers.exponential import Form, HistoryEntry, ModelValue, Noise, Relaxation, advance
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor

Compensate = Callable[[int, Sequence[HistoryEntry]], HistoryEntry]


@dataclass(frozen=True)
class Step:
    """How one step is made: from ``order`` values, as ``form``; ``correct``: the state that it predicted is corrected,
    once the model was read there, by the value just read and those it was made from (UniC; no evaluation more).

    ``relaxation`` is that of the prediction, ``correction`` that of the correction.
    """

    order: int = 2
    form: Form = "data"
    relaxation: Relaxation = "midpoint"
    correct: bool = False
    correction: Relaxation = "midpoint"


def multistep(
    predict: Predictor, x: Tensor, times: Sequence[float], steps: Sequence[Step], noise: Noise | None = None,
    compensate: Compensate | None = None,
) -> Tensor:  # fmt: skip
    """``steps[i]`` from ``times[i]`` to ``times[i + 1]``; N evaluations for N steps. A step uses at most the values
    that there are. ``compensate(i, known)`` gives what takes the place of the newest (DC-Solver)."""
    for state in states(predict, x, times, steps, noise, compensate):
        x = state
    return x


def states(
    predict: Predictor, x: Tensor, times: Sequence[float], steps: Sequence[Step], noise: Noise | None = None,
    compensate: Compensate | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The states of ``multistep`` at all nodes but the first, each as it is after its correction."""
    walk = MultistepState(predict.nodes(times), steps, noise, compensate)
    while not walk.done:
        corrected, following = walk.step(x, predict(x, walk.node.t))
        if walk.i > 1:
            yield corrected
        x = following
    yield x


class MultistepState:
    """A walk over nodes, told at each what the model says there."""

    def __init__(
        self, grid: Sequence[Node], steps: Sequence[Step], noise: Noise | None = None,
        compensate: Compensate | None = None,
    ) -> None:  # fmt: skip
        self.i = 0
        self._grid, self._steps, self._noise, self._compensate = grid, steps, noise, compensate
        self._known: list[HistoryEntry] = []  # the newest first
        self._most = max(step.order for step in steps) + 1
        self._before: Tensor | None = None  # the state, corrected, that the newest prediction started from

    @property
    def node(self) -> Node:
        """Where the model is to be read next."""
        return self._grid[self.i]

    @property
    def done(self) -> bool:
        return self.i == len(self._steps)

    def step(self, x: Tensor, said: ModelValue) -> tuple[Tensor, Tensor]:
        """The state at this node, corrected by what the model said at ``x``, and the state predicted for the next."""
        i, grid, step = self.i, self._grid, self._steps[self.i]
        read = HistoryEntry(grid[i], said)
        if self._before is not None and self._steps[i - 1].correct:
            last, known = self._steps[i - 1], self._known
            used = [known[0], read, *known[1 : min(last.order, len(known))]]
            x = advance(self._before, grid[i - 1], grid[i], used, last.form, last.correction)
        self._known = [read, *self._known[: self._most - 1]]
        if self._compensate is not None:
            self._known[0] = self._compensate(i, self._known)
        self._before, self.i = x, i + 1
        following = advance(x, grid[i], grid[i + 1], self._known[: step.order], step.form, step.relaxation, self._noise)
        return x, following


def falling_orders(order: int, steps: int) -> list[int]:
    """``order`` for every step, but at the end no more than the steps left (lower_order_final)."""
    return [min(order, steps - i) for i in range(steps)]
