"""DPM-Solver++ (Lu et al., arXiv 2211.01095): exponential integrators on the predicted x0, ODE and SDE.

``multistep_pp`` is 2M and 3M, ``singlestep_pp`` 2S. The paper's 3M halves its last term, which makes it of order 2 (see
``exponential.relax``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers.exponential import Form, HistoryEntry, Noise, Relaxation, advance
from fewstep.samplers.grids import Node
from fewstep.samplers.multistep import Step, falling_orders, multistep
from fewstep.samplers.predictor import Predictor


def multistep_pp(
    predict: Predictor, x: Tensor, times: Sequence[float], *, order: int = 2, relaxation: Relaxation = "published"
) -> Tensor:
    """++1, ++2M (midpoint) or ++3M; ``relaxation="none"`` gives the Taylor weights, of full order. N evaluations."""
    return multistep(predict, x, times, pp_steps(len(times) - 1, order, relaxation))


def pp_steps(steps: int, order: int = 2, relaxation: Relaxation = "published", form: Form = "data") -> list[Step]:
    """The steps of ``multistep_pp`` (of ``multistep_sde`` with ``form="sde"``), for ``multistep``."""
    return [Step(p, form, relaxation) for p in falling_orders(order, steps)]


def multistep_sde(
    predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None, *, order: int = 2,
    relaxation: Relaxation = "published",
) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++ 1, 2M or 3M; without ``noise``, its noise term is left out. N evaluations."""
    return multistep(predict, x, times, pp_steps(len(times) - 1, order, relaxation, "sde"), noise)


def singlestep_pp(
    predict: Predictor, x: Tensor, times: Sequence[float], *, relaxation: Relaxation = "midpoint"
) -> Tensor:
    """++2S: two evaluations per step, the second halfway in log-SNR; the step to sigma = 0 is ++1.

    ``relaxation="none"`` gives the exponential Runge-Kutta method of order 2 with c2 = 1/2 (RES, arXiv 2308.02157).
    """
    for s, t in pairwise(predict.nodes(times)):
        at_s = HistoryEntry(s, predict(x, s.t))
        if not has_inner_node(s, t):
            x = advance(x, s, t, [at_s])
            continue
        middle = inner_node(predict, s, t, 0.5)
        at_middle = HistoryEntry(middle, predict(advance(x, s, middle, [at_s]), middle.t))
        x = advance(x, s, t, [at_s, at_middle], "data", relaxation)
    return x


def has_inner_node(s: Node, t: Node) -> bool:
    """Whether the log-SNR is finite at both nodes, so that a model can be evaluated between them."""
    return s.alpha > 0 and t.sigma > 0


def inner_node(predict: Predictor, s: Node, t: Node, fraction: float) -> Node:
    """The node at a fraction of the distance from s to t in log-SNR."""
    log_snr = torch.tensor([s.log_snr + fraction * (t.log_snr - s.log_snr)], dtype=torch.float64)
    return predict.nodes(predict.schedule.time_of_log_snr(log_snr).tolist())[0]
