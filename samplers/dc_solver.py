"""DC-Solver (Zhao et al., arXiv 2409.03755): UniPC whose newest model output is shifted in time before it is used.

The output that belongs to a corrected state was computed at the state before correction. DC-Solver replaces it by the
Lagrange polynomial in t through the last three outputs, evaluated at ``rho t_i + (1 - rho) t_(i-1)``; rho = 1 is UniPC.
The ratios rho are searched step by step against a long run from the same noise, or predicted by a fitted polynomial
(``RatioPolynomial``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import reading
from fewstep.models.denoiser import Denoiser
from fewstep.samplers.exponential import HistoryEntry
from fewstep.samplers.multistep import Compensate, states
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.provenance import check_model
from fewstep.samplers.unipc import unipc, unipc_steps

COMMAND = "fewstep solver fit-dc"
FIRST_SHIFTED = 2  # the first step with the three outputs that a shift needs


class ShiftedOutput(NamedTuple):
    """A combination of model outputs, as x0 only."""

    x0: Tensor

    @property
    def noise(self) -> Tensor:
        raise NotImplementedError("DC-Solver works on x0")


def shift_newest(history: Sequence[HistoryEntry], rho: float) -> HistoryEntry:
    """The newest entry with x0 from the polynomial through the newest three at ``rho t_0 + (1 - rho) t_1``."""
    times = [entry.node.t for entry in history[:3]]
    target = rho * times[0] + (1 - rho) * times[1]
    total: Tensor | None = None
    for k, entry in enumerate(history[:3]):
        weight = 1.0
        for j, other in enumerate(times):
            if j != k:
                weight = weight * (target - other) / (times[k] - other)
        total = weight * entry.output.x0 if total is None else total + weight * entry.output.x0
    assert total is not None
    return HistoryEntry(history[0].node, ShiftedOutput(total))


def compensate_by(ratios: Sequence[float]) -> Compensate:
    """Compensation by ``ratios[i]`` at step i; the ratios of the first two steps are not used."""

    def compensate(i: int, history: Sequence[HistoryEntry]) -> HistoryEntry:
        return history[0] if i < FIRST_SHIFTED or ratios[i] == 1 else shift_newest(history, ratios[i])

    return compensate


def dc_solver(
    predict: Predictor, x: Tensor, times: Sequence[float], ratios: Sequence[float], *, order: int = 2
) -> Tensor:
    """UniPC of ``order`` with one ratio per step; N evaluations. Raises ``ValueError`` if their numbers differ."""
    if len(ratios) != len(times) - 1:
        raise ValueError(f"{len(times) - 1} steps need as many ratios, got {len(ratios)}")
    return unipc(predict, x, times, order=order, compensate=compensate_by(ratios))


@torch.no_grad()
def search_ratios(
    predict: Predictor, x: Tensor, times: Sequence[float], references: Sequence[Tensor], *, order: int = 2,
    rounds: int = 12,
) -> list[float]:  # fmt: skip
    """One ratio per step, searched in order: each minimizes the mean square distance, over the batch ``x``, of the next
    corrected state from ``references``, the states at nodes 1 to N of a long run from the same noise.

    The paper trains the ratios by AdamW through the network. Since a ratio is a single number, ``rounds`` of a
    golden-section search within [0, 2] need no gradient. A ratio stays 1 unless the search improves on it.

    Raises ``UserError`` if a state of the long run is not finite.
    """
    if not all(reference.isfinite().all() for reference in references):
        raise UserError("The states of the long run are not finite: the model is damaged, or the guidance too high.")
    ratios = [1.0] * (len(times) - 1)
    steps = unipc_steps(len(ratios), order)
    for i in range(FIRST_SHIFTED, len(ratios)):

        def distance(rho: float, i: int = i) -> float:
            compensate = compensate_by([*ratios[:i], rho, *ratios[i + 1 :]])
            state = next(islice(states(predict, x, times, steps, compensate=compensate), i, None))
            return (state - references[i]).square().mean().item()

        best = golden_section(distance, 0.0, 2.0, rounds)
        ratios[i] = best if distance(best) < distance(1.0) else 1.0
    return ratios


def golden_section(f: Callable[[float], float], low: float, high: float, rounds: int) -> float:
    """The minimizer of a function with one minimum in [low, high]; each evaluation shrinks the interval by 0.618."""
    factor = (math.sqrt(5) - 1) / 2
    a, b = high - factor * (high - low), low + factor * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(rounds - 2):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - factor * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + factor * (high - low)
            fb = f(b)
    return a if fa < fb else b


@dataclass(frozen=True)
class RatioPolynomial:
    """Ratios as nested polynomials (the paper's cascade polynomial regression): a cubic of the step's fraction of all
    steps, whose coefficients are quadratics of guidance, whose coefficients are quadratics of the number of steps.

    ``coefficients`` [4, 3, 3]. Valid within the numbers of steps and guidance scales of the fit.
    """

    coefficients: np.ndarray

    @staticmethod
    def features(steps: int, guidance: float) -> np.ndarray:
        """The features [steps, 36] of which the ratios are a linear function."""
        n, w = (np.array([v * v, v, 1.0]) for v in (steps / 50, guidance / 12))
        fraction = np.arange(1, steps + 1) / steps
        products: np.ndarray = np.einsum("ij,k,l->ijkl", fraction[:, None] ** np.arange(4), w, n)
        return products.reshape(steps, 36)

    @staticmethod
    def fit(searched: Mapping[tuple[int, float], Sequence[float]]) -> RatioPolynomial:
        """The least-squares fit of minimum norm to searched ratios by (steps, guidance)."""
        rows = np.concatenate([RatioPolynomial.features(*key)[FIRST_SHIFTED:] for key in searched])
        values = np.concatenate([np.array(ratios[FIRST_SHIFTED:]) for ratios in searched.values()])
        return RatioPolynomial(np.linalg.lstsq(rows, values, rcond=1e-10)[0].reshape(4, 3, 3))

    def ratios(self, steps: int, guidance: float) -> list[float]:
        predicted = RatioPolynomial.features(steps, guidance) @ self.coefficients.reshape(36)
        return [1.0] * min(FIRST_SHIFTED, steps) + [float(ratio) for ratio in predicted[FIRST_SHIFTED:]]


class SearchedRatios(BaseModel):
    """The ratios of one number of steps and guidance scale, and what they were searched on: the ``grid`` (as in
    ``SamplingConfig``), and the hash of the ``model``'s weights, which older files lack."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    steps: int = Field(ge=1, le=10_000)
    guidance: float = Field(ge=-1e3, le=1e3)
    order: int = Field(ge=1, le=10)
    ratios: list[Annotated[float, Field(ge=-1e3, le=1e3)]]
    grid: str = "time"
    model: str | None = None

    @model_validator(mode="after")
    def _one_per_step(self) -> Self:
        if len(self.ratios) != self.steps:
            raise ValueError(f"{self.steps} steps need as many ratios, not {len(self.ratios)}")
        return self


@torch.no_grad()
def reference_states(predict: Predictor, x: Tensor, times: Sequence[float], finer: int = 20) -> list[Tensor]:
    """The states at nodes 1 to N of a UniPC-3 run with ``finer`` substeps per step."""
    fine_times = [a + (b - a) * k / finer for a, b in pairwise(times) for k in range(finer)]
    fine_states = states(predict, x, [*fine_times, times[-1]], unipc_steps(len(fine_times), 3))
    return list(islice(fine_states, finer - 1, None, finer))


def read_ratios(
    file: Path, steps: int, guidance: float, order: int = 2, *, grid: str = "time", denoiser: Denoiser | None = None
) -> list[float]:
    """The ratios in ``file`` for a number of steps, guidance scale and grid, or those of a polynomial fitted to the
    file's ratios for the grid.

    Raises ``UserError`` if the file is missing, invalid or of another model, or if the request lies outside what it
    covers.
    """
    with reading(file, "file of ratios", f"DC-Solver needs the model's: run {COMMAND}."):
        entries = TypeAdapter(list[SearchedRatios]).validate_json(file.read_bytes())
    for model in {entry.model for entry in entries}:
        check_model(file, model, denoiser, COMMAND)
    grids = sorted({entry.grid for entry in entries})
    if grid not in grids:
        raise UserError(
            f"The ratios in {file} were searched on the grid {', '.join(grids)} and do not fit the grid {grid!r}: "
            f"choose that grid, or run {COMMAND} --grid {grid}."
        )
    usable = [entry for entry in entries if entry.order == order and entry.grid == grid]
    searched = {(entry.steps, entry.guidance): entry.ratios for entry in usable}
    if (steps, guidance) in searched:
        return searched[steps, guidance]
    counts, scales = {n for n, _ in searched}, {w for _, w in searched}
    if not searched or not (min(counts) <= steps <= max(counts) and min(scales) <= guidance <= max(scales)):
        covered = ", ".join(f"{n} steps at {w:g}" for n, w in searched) or "none"
        raise UserError(f"{file} has no ratios near {steps} steps at guidance {guidance:g} (it has {covered}).")
    return RatioPolynomial.fit(searched).ratios(steps, guidance)
