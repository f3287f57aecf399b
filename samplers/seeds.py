"""SEEDS-2 and SEEDS-3 (Gonzalez et al., arXiv 2305.14267): DPM-Solver's stages for the SDE, along one path of noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.samplers.dpm_solver_pp import has_inner_node, inner_node
from fewstep.samplers.exponential import HistoryEntry, Noise, advance, exponential_weights
from fewstep.samplers.grids import Node
from fewstep.samplers.predictor import Predictor


def seeds(predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise | None, *, order: int = 2) -> Tensor:
    """``order`` evaluations (2 or 3) per step, equally spaced in log-SNR, of the predicted x0. Steps from alpha = 0 and
    to sigma = 0 are of first order."""
    for s, t in pairwise(predict.nodes(times)):
        at_s = HistoryEntry(s, predict(x, s.t))
        if not has_inner_node(s, t):
            x = advance(x, s, t, [at_s], "sde", noise=noise)
            continue
        inner = [inner_node(predict, s, t, k / order) for k in range(1, order)]
        path = noise_path([s, *inner, t], x, noise)
        used = [at_s]
        for node, added in zip(inner, path, strict=False):
            newest = HistoryEntry(node, predict(advance(x, s, node, used, "sde") + added, node.t))
            used = [at_s, newest]
        x = advance(x, s, t, used, "sde", "midpoint" if order == 2 else "none") + path[-1]
    return x


def noise_path(nodes: Sequence[Node], x: Tensor, noise: Noise | None) -> list[Tensor]:
    """The noise that the SDE has added since ``nodes[0]``, at every later node; zero without ``noise``."""
    total, path = torch.zeros_like(x), []
    for a, b in pairwise(nodes):
        weights = exponential_weights(a, b, (a.log_snr,), "sde", "none")
        total = weights.state * total + (weights.noise * noise() if noise is not None else 0)
        path.append(total)
    return path
