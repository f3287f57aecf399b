"""The loop of every multistep rule: DPM-Solver++ M, SDE-DPM-Solver++, UniPC, DC-Solver, and any mixture of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.samplers.exponential import Form, Known, Noise, Relaxation, advance
from fewstep.samplers.predictor import Predictor

Compensate = Callable[[int, Sequence[Known]], Known]


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
    grid = predict.nodes(times)
    known: list[Known] = []  # the newest first
    most = max(step.order for step in steps) + 1
    before = x  # the state, corrected, that the newest prediction started from
    for i, step in enumerate(steps):
        read = Known(grid[i], predict(x, grid[i].t))
        if i and steps[i - 1].correct:
            last = steps[i - 1]
            used = [known[0], read, *known[1 : min(last.order, len(known))]]
            x = advance(before, grid[i - 1], grid[i], used, last.form, last.correction)
        if i:
            yield x
        known = [read, *known[: most - 1]]
        if compensate is not None:
            known[0] = compensate(i, known)
        before = x
        x = advance(x, grid[i], grid[i + 1], known[: step.order], step.form, step.relaxation, noise)
    yield x


def falling_orders(order: int, steps: int) -> list[int]:
    """``order`` for every step, but at the end no more than the steps left (lower_order_final)."""
    return [min(order, steps - i) for i in range(steps)]
