"""DC-Solver (Zhao et al., arXiv 2409.03755): UniPC whose newest value is shifted in time before it is used.

A corrected state has a value of the model that was read at the state before correction. In its place goes what the last
three values say, by Lagrange's polynomial in t, of the time ``rho t_i + (1 - rho) t_(i-1)``; rho = 1 is UniPC. The
ratios are searched step by step against a long run from the same noise, or read off a fitted polynomial (``Cascade``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.samplers.exponential import HistoryEntry
from fewstep.samplers.multistep import Compensate, states
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.unipc import unipc, unipc_steps

FIRST = 2  # the first step with the three values that a shift needs


class Shifted(NamedTuple):
    """A value made of others."""

    x0: Tensor

    @property
    def noise(self) -> Tensor:
        raise NotImplementedError("DC-Solver works on x0")


def shifted(known: Sequence[HistoryEntry], rho: float) -> HistoryEntry:
    """The newest of three values in the place of which the others let one think at ``rho t_0 + (1 - rho) t_1``."""
    times = [value.node.t for value in known[:3]]
    at = rho * times[0] + (1 - rho) * times[1]
    total: Tensor | None = None
    for k, value in enumerate(known[:3]):
        share = 1.0
        for j, other in enumerate(times):
            if j != k:
                share = share * (at - other) / (times[k] - other)
        total = share * value.said.x0 if total is None else total + share * value.said.x0
    assert total is not None
    return HistoryEntry(known[0].node, Shifted(total))


def compensation(ratios: Sequence[float]) -> Compensate:
    """``ratios[i]`` for step i; those of the first two steps are not used."""

    def compensate(i: int, known: Sequence[HistoryEntry]) -> HistoryEntry:
        return known[0] if i < FIRST or ratios[i] == 1 else shifted(known, ratios[i])

    return compensate


def dc_solver(
    predict: Predictor, x: Tensor, times: Sequence[float], ratios: Sequence[float], *, order: int = 2
) -> Tensor:
    """UniPC of ``order`` with a ratio for every step. N reads. Raises ``ValueError`` on another number of ratios."""
    if len(ratios) != len(times) - 1:
        raise ValueError(f"{len(times) - 1} steps need as many ratios, got {len(ratios)}")
    return unipc(predict, x, times, order=order, compensate=compensation(ratios))


@torch.no_grad()
def search(
    predict: Predictor, x: Tensor, times: Sequence[float], goals: Sequence[Tensor], *, order: int = 2, rounds: int = 12
) -> list[float]:
    """The ratios of the steps, one after the other: each that whose next corrected state is nearest, in mean square
    over the batch ``x``, to ``goals``, the states at nodes 1 to N of a long run from the same noise.

    The paper descends by AdamW through the network. A ratio is one number: ``rounds`` of a golden-section search within
    [0, 2] need no gradient, and 1 is kept unless another is better.
    """
    ratios = [1.0] * (len(times) - 1)
    steps = unipc_steps(len(ratios), order)
    for i in range(FIRST, len(ratios)):

        def distance(rho: float, i: int = i) -> float:
            tried = compensation([*ratios[:i], rho, *ratios[i + 1 :]])
            reached = next(islice(states(predict, x, times, steps, compensate=tried), i, None))
            return (reached - goals[i]).square().mean().item()

        best = golden(distance, 0.0, 2.0, rounds)
        ratios[i] = best if distance(best) < distance(1.0) else 1.0
    return ratios


def golden(f: Callable[[float], float], low: float, high: float, rounds: int) -> float:
    """Where f, of one minimum in [low, high], is least: the interval shrinks by 0.618 with each value asked for."""
    share = (math.sqrt(5) - 1) / 2
    a, b = high - share * (high - low), low + share * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(rounds - 2):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - share * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + share * (high - low)
            fb = f(b)
    return a if fa < fb else b


@dataclass(frozen=True)
class Cascade:
    """Ratios as nested polynomials (the paper's cascade polynomial regression): of the step's share of all, with
    coefficients that are quadratics of guidance, whose coefficients are quadratics of the number of steps [4, 3, 3].

    It says nothing outside the numbers of steps and scales that it was fitted to.
    """

    coefficients: np.ndarray

    @staticmethod
    def features(steps: int, guidance: float) -> np.ndarray:
        """[steps, 36]: what the ratios are linear in."""
        n, w = (np.array([v * v, v, 1.0]) for v in (steps / 50, guidance / 12))
        share = np.arange(1, steps + 1) / steps
        products: np.ndarray = np.einsum("ij,k,l->ijkl", share[:, None] ** np.arange(4), w, n)
        return products.reshape(steps, 36)

    @staticmethod
    def fit(searched: Mapping[tuple[int, float], Sequence[float]]) -> Cascade:
        """The least-squares fit, of least norm, to searched ratios by (steps, guidance)."""
        rows = np.concatenate([Cascade.features(*key)[FIRST:] for key in searched])
        values = np.concatenate([np.array(ratios[FIRST:]) for ratios in searched.values()])
        return Cascade(np.linalg.lstsq(rows, values, rcond=1e-10)[0].reshape(4, 3, 3))

    def ratios(self, steps: int, guidance: float) -> list[float]:
        found = Cascade.features(steps, guidance) @ self.coefficients.reshape(36)
        return [1.0] * min(FIRST, steps) + [float(ratio) for ratio in found[FIRST:]]


class Searched(BaseModel):
    """The ratios found for a number of steps and a guidance scale, on the grid ``time``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int
    guidance: float
    order: int
    ratios: list[float]


@torch.no_grad()
def goals(predict: Predictor, x: Tensor, times: Sequence[float], finer: int = 20) -> list[Tensor]:
    """The states at nodes 1 to N of a run of UniPC-3 with ``finer`` steps in the place of one."""
    between = [a + (b - a) * k / finer for a, b in pairwise(times) for k in range(finer)]
    walk = states(predict, x, [*between, times[-1]], unipc_steps(len(between), 3))
    return list(islice(walk, finer - 1, None, finer))


def read_ratios(file: Path, steps: int, guidance: float, order: int = 2) -> list[float]:
    """The ratios that ``file`` (of ``fewstep ratios``) has for a number of steps and a scale, or that fit those it has.
    Raises ``UserError`` if there is no such file or it says nothing here."""
    try:
        found = TypeAdapter(list[Searched]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"DC-Solver needs the model's ratios, {file}: search them with fewstep ratios.") from error
    known = {(one.steps, one.guidance): one.ratios for one in found if one.order == order}
    if (steps, guidance) in known:
        return known[steps, guidance]
    counts, scales = {n for n, _ in known}, {w for _, w in known}
    if not known or not (min(counts) <= steps <= max(counts) and min(scales) <= guidance <= max(scales)):
        have = ", ".join(f"{n} steps at {w:g}" for n, w in known)
        raise UserError(f"{file} has no ratios near {steps} steps at guidance {guidance:g} (it has {have or 'none'}).")
    return Cascade.fit(known).ratios(steps, guidance)
