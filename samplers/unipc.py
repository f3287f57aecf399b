"""UniPC (Zhao et al., arXiv 2302.04867): a multistep predictor, and a corrector without additional evaluations.

The paper's B(h) (``bh1``: h, ``bh2``: e^h - 1) cancels wherever the weights are solved for. It only matters where a
weight is set to 1/2 by convention: in the predictor of order 2 and the corrector of order 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor

from fewstep.samplers.exponential import Relaxation
from fewstep.samplers.multistep import Compensate, Step, falling_orders, multistep
from fewstep.samplers.predictor import Predictor

Variant = Literal["bh1", "bh2"]
RELAXATIONS: Mapping[Variant, Relaxation] = {"bh1": "bh1", "bh2": "midpoint"}


def unipc(
    predict: Predictor, x: Tensor, times: Sequence[float], *, order: int = 2, variant: Variant = "bh2",
    correct: bool = True, uncorrected: Collection[int] = (), compensate: Compensate | None = None,
) -> Tensor:  # fmt: skip
    """UniPC-p: UniP-p, and UniC-p after every step except the last and the indices ``uncorrected``. N evaluations."""
    steps = unipc_steps(len(times) - 1, order, variant, correct, uncorrected)
    return multistep(predict, x, times, steps, compensate=compensate)


def unipc_steps(
    steps: int, order: int = 2, variant: Variant = "bh2", correct: bool = True,
    uncorrected: Collection[int] = (),
) -> list[Step]:  # fmt: skip
    """The steps of ``unipc``, for ``multistep``."""
    relaxation = RELAXATIONS[variant]
    return [
        Step(p, "data", relaxation, correct and i not in uncorrected, relaxation)
        for i, p in enumerate(falling_orders(order, steps))
    ]
