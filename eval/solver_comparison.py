"""Comparing a teacher's training-free solvers: error to a long run from the same noise, and quality, by NFE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import check_writable, read_metadata, read_tensors, reading, write_tensors, write_text
from fewstep.core.image_files import to_bytes
from fewstep.eval.hashes import model_sha256
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.features import extract_features
from fewstep.eval.references import Reference
from fewstep.models.loading import Model
from fewstep.samplers.generate import Samples, generate
from fewstep.samplers.grids import given_steps
from fewstep.samplers.plan import SamplingConfig, plan, steps_within


class SolverResult(BaseModel):
    """One solver on one grid within one budget of evaluations.

    ``error`` is the root mean square distance of its samples from those of ``long`` steps, in the model's range;
    ``metric`` and ``value`` are the Fréchet distance to a reference, if one was given.
    """

    model_config = ConfigDict(frozen=True)
    model: str
    solver: str
    grid: str
    nfe: int
    budget: int
    steps: int
    guidance: float
    error: float
    metric: str | None = None
    value: float | None = None
    n: int
    seed: int
    long: int


RESULTS = TypeAdapter(list[SolverResult])
RESULTS_FILE, LONG_RUN_FILE = "solvers.json", "long.safetensors"
Key = tuple[str, str, int]  # solver, grid, budget


def read_results(file: Path) -> list[SolverResult]:
    """The results in a ``solvers.json``. Raises ``UserError`` if it cannot be read."""
    with reading(file, "file of solver results", "Move it or choose another file."):
        return RESULTS.validate_json(file.read_bytes())


def compare_solvers(
    model: Model, labels: Tensor, real: Reference | None, folder: Path, *, name: str, solvers: Sequence[str],
    nfe: Sequence[int], grids: Sequence[str], guidance: float, long: int, seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[SolverResult]:  # fmt: skip
    """One result per solver, grid and budget, against ``long`` steps of UniPC-3 from the same noise.

    ``folder`` keeps the long run and every result, so that a comparison with the same model, guidance, samples and long
    run can be continued or extended. ``progress(done, total)`` counts network evaluations per sample. Raises
    ``UserError`` on a grid that lists its times, a solver that adds noise, and the long run as one of the solvers.
    """
    if listed := [grid for grid in grids if given_steps(grid) is not None]:
        raise UserError(
            f"{listed[0]!r} has one number of steps, but a comparison needs a grid for every budget of evaluations: "
            "give a spacing. fewstep sample and fewstep eval take times."
        )
    requests = [
        (solver, grid, budget, steps_within(solver, budget, guidance != 1, model.config))
        for solver in solvers for grid in grids for budget in nfe
    ]  # fmt: skip
    longest = plan(model, SamplingConfig("unipc_3", long, guidance, "log_snr"))
    for solver, grid, _, steps in requests:
        chosen = plan(model, SamplingConfig(solver, steps, guidance, grid))
        if chosen.solver.noisy:
            raise UserError(f"{solver!r} adds noise, so its samples have no error to a long run.")
        if chosen == longest:
            raise UserError(f"{solver} with {steps} steps on {grid} is the long run itself: choose fewer evaluations.")
    long_cost = long * (1 if guidance == 1 else 2)
    done, total = 0, long_cost + sum(budget for *_, budget, _ in requests)

    def sample(solver: str, steps: int, grid: str, cost: int) -> Samples:
        def report(samples: int) -> None:
            if progress is not None:
                progress(done + cost * samples // len(labels), total)

        return generate(model, labels, SamplingConfig(solver, steps, guidance, grid, seed), progress=report)

    check_writable(folder / LONG_RUN_FILE)
    settings = {"model": name, "guidance": guidance, "n": len(labels), "seed": seed, "long": long}
    metadata = {"settings": json.dumps(settings), "model_sha256": model_sha256(model)}
    exact, known = _read_folder(folder, metadata)
    if exact is None:
        exact = sample("unipc_3", long, "log_snr", long_cost).x0
        write_tensors({"x0": exact}, folder / LONG_RUN_FILE, metadata)
    done = long_cost
    results: list[SolverResult] = []
    for solver, grid, budget, steps in requests:
        result = known.get((solver, grid, budget))
        if result is None or (real is not None and result.metric != real.metric):
            samples = sample(solver, steps, grid, budget)
            result = SolverResult(
                solver=solver, grid=grid, nfe=samples.nfe, budget=budget, steps=steps,
                error=(samples.x0 - exact).square().mean().sqrt().item(), metric=real.metric if real else None,
                value=_distance(real, samples.x0) if real else None, **settings,
            )  # fmt: skip
            known[solver, grid, budget] = result
            content = json.dumps([each.model_dump() for each in known.values()], indent=1)
            write_text(content + "\n", folder / RESULTS_FILE)
        results.append(result)
        done += budget
    return results


def _distance(real: Reference, x0: Tensor) -> float:
    features = extract_features(real.network, to_bytes(x0))
    return frechet_distance(Statistics.of(features), real.statistics)


def _read_folder(folder: Path, metadata: dict[str, str]) -> tuple[Tensor | None, dict[Key, SolverResult]]:
    """The samples of the long run, or None, and the results in a folder. Raises ``UserError`` if the long run has other
    ``metadata``: other settings, or another model."""
    file = folder / LONG_RUN_FILE
    if not file.is_file():
        return None, {}
    if read_metadata(file) != metadata:
        raise UserError(
            f"{folder} contains a comparison with other settings or of another model; choose another --out."
        )
    results = read_results(folder / RESULTS_FILE) if (folder / RESULTS_FILE).is_file() else []
    return read_tensors(file)["x0"], {(result.solver, result.grid, result.budget): result for result in results}


def best_grids(results: Sequence[SolverResult]) -> list[SolverResult]:
    """Each solver's results on its best grid, the one with the lowest geometric mean of errors over all budgets."""
    chosen: list[SolverResult] = []
    for solver in dict.fromkeys(result.solver for result in results):
        by_grid: dict[str, list[SolverResult]] = {}
        for result in results:
            if result.solver == solver:
                by_grid.setdefault(result.grid, []).append(result)
        chosen += min(by_grid.values(), key=lambda group: geometric_mean([result.error for result in group]))
    return chosen


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table_rows(results: Sequence[SolverResult]) -> list[list[str]]:
    """A header, then one row per solver: its error (and score) for every budget, and the geometric mean of errors."""
    budgets = sorted({result.budget for result in results})
    rows = [["solver", "grid", *(f"{budget} NFE" for budget in budgets), "geometric mean"]]
    for solver in dict.fromkeys(result.solver for result in results):
        by_budget = {result.budget: result for result in results if result.solver == solver}
        cells = [_cell(by_budget[budget]) if budget in by_budget else "" for budget in budgets]
        mean = geometric_mean([result.error for result in by_budget.values()])
        rows.append([solver, next(iter(by_budget.values())).grid, *cells, f"{mean:.4f}"])
    return rows


def _cell(result: SolverResult) -> str:
    return f"{result.error:.4f}" + (f" ({result.value:.2f})" if result.value is not None else "")
