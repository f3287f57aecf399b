"""SA-Solver (Xue et al., arXiv 2309.05019): stochastic Adams predictor and corrector, of any stochasticity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fewstep.samplers.exponential import Noise
from fewstep.samplers.multistep import Step, falling_orders, multistep
from fewstep.samplers.predictor import Predictor

Tau = Callable[[float], float]


def middle_times(t: float) -> float:
    """1 in the middle of the run, 0.2 <= t <= 0.8, and 0 (no noise) at either end."""
    return 1.0 if 0.2 <= t <= 0.8 else 0.0


def sa_solver(
    predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None, *, order: int = 3,
    tau: Tau = middle_times,
) -> Tensor:  # fmt: skip
    """The ``order``-step predictor and the corrector from the same outputs and the new one, whose noise is that of the
    prediction that it corrects. ``tau`` at the start of a step is the stochasticity of the step: 0 is the ODE, 1 the
    reverse SDE. N evaluations."""
    orders = falling_orders(order, len(times) - 1)
    steps = [Step(p, "sde", "none", True, "none", tau(t)) for p, t in zip(orders, times, strict=False)]
    return multistep(predict, x, times, steps, noise)
