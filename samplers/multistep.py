"""The loop of every multistep rule in log-SNR: DPM-Solver++ M and its SDE, UniPC, SA-Solver, DC-Solver, any mixture."""

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
    predicted it, relaxed by ``correction`` (UniC; no additional evaluation). In the form ``sde``, of stochasticity
    ``tau``, the correction adds the same noise as the prediction did.
    """

    order: int = 2
    form: Form = "data"
    relaxation: Relaxation = "midpoint"
    correct: bool = False
    correction: Relaxation = "midpoint"
    tau: float = 1.0


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
        self._drawn: Tensor | None = None  # the noise of the newest prediction

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
            noise = None if self._drawn is None else self._same_noise
            x = advance(self._previous, grid[i - 1], grid[i], used, last.form, last.correction, noise, last.tau)
        self._history = [entry, *self._history[: self._max_history - 1]]
        if self._compensate is not None:
            self._history[0] = self._compensate(i, self._history)
        self._previous, self._drawn, self.index = x, None, i + 1
        noise = None if self._noise is None else self._fresh_noise
        used = self._history[: step.order]
        return x, advance(x, grid[i], grid[i + 1], used, step.form, step.relaxation, noise, step.tau)

    def _fresh_noise(self) -> Tensor:
        assert self._noise is not None
        self._drawn = self._noise()
        return self._drawn

    def _same_noise(self) -> Tensor:
        assert self._drawn is not None
        return self._drawn


def falling_orders(order: int, steps: int) -> list[int]:
    """The order of each step: ``order``, but at most the number of steps left (lower_order_final)."""
    return [min(order, steps - i) for i in range(steps)]
