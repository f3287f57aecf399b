"""A teacher's training-free solvers side by side: error to a long run from the same noise, and quality, by NFE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import check_writable, read_metadata, read_tensors, write_tensors, write_text
from fewstep.core.image_files import to_bytes
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.features import extract
from fewstep.eval.references import Reference
from fewstep.models.loading import Model
from fewstep.samplers.generate import Samples, generate
from fewstep.samplers.plan import SamplingConfig, plan, steps_within
from fewstep.samplers.solvers import SOLVERS


class Line(BaseModel):
    """One solver at one number of evaluations. ``error`` is the root mean square distance of its samples from those of
    the long run, in the model's range; ``metric`` and ``value`` a reference's score, if it was asked for."""

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


LINES = TypeAdapter(list[Line])
LINES_FILE, LONG = "sweep.json", "long.safetensors"


def read_lines(file: Path) -> list[Line]:
    """The lines of a ``sweep.json``. Raises ``UserError`` if it is none."""
    try:
        return LINES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{file} is no readable file of a sweep; move it away or name another.") from error


def compare_solvers(
    model: Model, labels: Tensor, real: Reference | None, folder: Path, *, name: str, solvers: Sequence[str],
    nfe: Sequence[int], grids: Sequence[str], guidance: float, long: int, seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Line]:  # fmt: skip
    """A line for every solver, grid and budget, against ``long`` steps of UniPC-3 from the same noise; ``progress`` is
    told network evaluations a sample. The long run and every line are kept in ``folder``, where another sweep of the
    same model, guidance, samples and long run goes on."""
    for solver in solvers:
        if solver in SOLVERS and SOLVERS[solver].noisy:
            raise UserError(f"{solver!r} adds noise of its own, so its samples have no error to a long run.")
    requests = [
        (solver, grid, budget, steps_within(solver, budget, guidance != 1, model.config))
        for solver in solvers for grid in grids for budget in nfe
    ]  # fmt: skip
    for solver, grid, _, steps in requests:
        plan(model, SamplingConfig(solver, steps, guidance, grid))
    done, total = 0, long * (1 if guidance == 1 else 2) + sum(budget for *_, budget, _ in requests)

    def drawn(solver: str, steps: int, grid: str, budget: int) -> Samples:
        def report(samples: int) -> None:
            if progress is not None:
                progress(done + budget * samples // len(labels), total)

        return generate(model, labels, SamplingConfig(solver, steps, guidance, grid, seed), progress=report)

    check_writable(folder / LONG)
    settings = {"model": name, "guidance": guidance, "n": len(labels), "seed": seed, "long": long}
    exact, known = _begun(folder, settings)
    if exact is None:
        exact = drawn("unipc_3", long, "log_snr", total - sum(budget for *_, budget, _ in requests)).x0
        write_tensors({"x0": exact}, folder / LONG, {"settings": json.dumps(settings)})
    done = total - sum(budget for *_, budget, _ in requests)
    lines: list[Line] = []
    for solver, grid, budget, steps in requests:
        line = known.get((solver, grid, budget))
        if line is None or (real is not None and line.value is None):
            samples = drawn(solver, steps, grid, budget)
            value = None
            if real is not None:
                value = frechet_distance(Statistics.of(extract(real.network, to_bytes(samples.x0))), real.statistics)
            line = Line(
                solver=solver, grid=grid, nfe=samples.nfe, budget=budget, steps=steps, value=value,
                error=(samples.x0 - exact).square().mean().sqrt().item(), metric=real.metric if real else None,
                **settings,
            )  # fmt: skip
            known[solver, grid, budget] = line
            write_text(json.dumps([one.model_dump() for one in known.values()], indent=1) + "\n", folder / LINES_FILE)
        lines.append(line)
        done += budget
    return lines


def _begun(folder: Path, settings: dict[str, Any]) -> tuple[Tensor | None, dict[tuple[str, str, int], Line]]:
    """The long run's samples and the lines that are in a folder already. Raises ``UserError`` if they are of other
    settings."""
    file = folder / LONG
    if not file.is_file():
        return None, {}
    if read_metadata(file) != {"settings": json.dumps(settings)}:
        raise UserError(f"{folder} holds a sweep of other settings; choose another --out.")
    lines = read_lines(folder / LINES_FILE) if (folder / LINES_FILE).is_file() else []
    return read_tensors(file)["x0"], {(line.solver, line.grid, line.budget): line for line in lines}


def at_their_best(lines: Sequence[Line]) -> list[Line]:
    """Of every solver the lines of one grid: that of the least geometric mean of the errors over all budgets."""
    chosen: list[Line] = []
    for solver in dict.fromkeys(line.solver for line in lines):
        own = [line for line in lines if line.solver == solver]
        grids = {grid: [line for line in own if line.grid == grid] for grid in dict.fromkeys(line.grid for line in own)}
        chosen += min(grids.values(), key=lambda some: geometric_mean([line.error for line in some]))
    return chosen


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """A header, then a row a solver: its error (and score) at every budget, and the geometric mean of the errors."""
    budgets = sorted({line.budget for line in lines})
    table = [["solver", "grid", *(f"{budget} NFE" for budget in budgets), "geometric mean"]]
    for solver in dict.fromkeys(line.solver for line in lines):
        own = {line.budget: line for line in lines if line.solver == solver}
        shown = [_cell(own[budget]) if budget in own else "" for budget in budgets]
        mean = geometric_mean([line.error for line in own.values()])
        table.append([solver, next(iter(own.values())).grid, *shown, f"{mean:.4f}"])
    return table


def _cell(line: Line) -> str:
    return f"{line.error:.4f}" + (f" ({line.value:.2f})" if line.value is not None else "")
