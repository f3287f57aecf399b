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
    """The decisions of one step: it uses ``order`` model outputs in the given ``form``, relaxed by ``relaxation``.

    With ``correct``, the state that the step predicts is corrected by the model output there and the outputs that
    predicted it, relaxed by ``correction`` (UniC; no additional evaluation).
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
    """``steps[i]`` from ``times[i]`` to ``times[i + 1]``; N evaluations for N steps. The first steps use all existing
    outputs. ``compensate(i, history)`` returns an entry that replaces the newest (DC-Solver)."""
    for state in states(predict, x, times, steps, noise, compensate):
        x = state
    return x


def states(
    predict: Predictor, x: Tensor, times: Sequence[float], steps: Sequence[Step], noise: Noise | None = None,
    compensate: Compensate | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The states of ``multistep`` at all nodes but the first, after their correction."""
    solver = MultistepState(predict.nodes(times), steps, noise, compensate)
    while not solver.done:
        corrected, following = solver.step(x, predict(x, solver.node.t))
        if solver.index > 1:
            yield corrected
        x = following
    yield x


class MultistepState:
    """The state of a multistep run between its steps, for callers that evaluate the model themselves."""

    def __init__(
        self, grid: Sequence[Node], steps: Sequence[Step], noise: Noise | None = None,
        compensate: Compensate | None = None,
    ) -> None:  # fmt: skip
        self.index = 0
        self._grid, self._steps, self._noise, self._compensate = grid, steps, noise, compensate
        self._history: list[HistoryEntry] = []  # newest first
        self._max_history = max(step.order for step in steps) + 1
        if compensate is not None:
            self._max_history = max(self._max_history, 3)  # DC-Solver's polynomial goes through three outputs
        self._previous: Tensor | None = None  # the corrected state from which the newest prediction started

    @property
    def node(self) -> Node:
        """The node at which to evaluate the model next."""
        return self._grid[self.index]

    @property
    def done(self) -> bool:
        return self.index == len(self._steps)

    def step(self, x: Tensor, output: ModelValue) -> tuple[Tensor, Tensor]:
        """The state at this node, corrected by the model's ``output`` at ``x``, and the prediction at the next."""
        i, grid, step = self.index, self._grid, self._steps[self.index]
        entry = HistoryEntry(grid[i], output)
        if self._previous is not None and self._steps[i - 1].correct:
            last, history = self._steps[i - 1], self._history
            used = [history[0], entry, *history[1 : min(last.order, len(history))]]
            x = advance(self._previous, grid[i - 1], grid[i], used, last.form, last.correction)
        self._history = [entry, *self._history[: self._max_history - 1]]
        if self._compensate is not None:
            self._history[0] = self._compensate(i, self._history)
        self._previous, self.index = x, i + 1
        used = self._history[: step.order]
        return x, advance(x, grid[i], grid[i + 1], used, step.form, step.relaxation, self._noise)


def falling_orders(order: int, steps: int) -> list[int]:
    """The order of each step: ``order``, but at most the number of steps left (lower_order_final)."""
    return [min(order, steps - i) for i in range(steps)]
