"""A teacher's training-free solvers: comparing them, and measuring what some of them need to know about a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from fewstep.api.models import Source, load
from fewstep.core.errors import UserError
from fewstep.core.files import check_writable, write_text
from fewstep.eval.references import load_reference
from fewstep.eval.report.solver_figure import write_solver_comparison
from fewstep.eval.solver_comparison import SolverResult
from fewstep.eval.solver_comparison import compare_solvers as compare_model_solvers
from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.weights_hash import weights_hash
from fewstep.samplers.dc_solver import SearchedRatios, reference_states, search_ratios
from fewstep.samplers.generate import SampleNoise, generate
from fewstep.samplers.plan import SamplingConfig, plan
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.statistics import estimate_statistics

SEARCH_SEED = 12345  # of the samples that solvers are tuned on: far from the seeds that people compare


def compare_solvers(
    source: Source, *, solvers: Sequence[str], nfe: Sequence[int], folder: Source, grids: Sequence[str] = ("time",),
    guidance: float = 1.0, n: int = 2_000, long: int = 1000, reference: str | None = None, seed: int = 0,
    device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> list[SolverResult]:  # fmt: skip
    """Compares every solver, grid and budget of evaluations of a class-conditional teacher with ``long`` steps of
    UniPC-3 from the same noise (and scores them, with ``reference``). Writes ``solvers.json``, ``solvers.md`` and
    ``solvers.png``; existing results in ``folder`` are kept, so that a comparison can be continued or extended.

    Raises ``UserError`` before sampling: on an unknown solver or grid, a solver that adds noise, a budget too small for
    one step, numbers out of range, and a comparison of the long run with itself.
    """
    check_at_least(1, n=n, long=long, **{"a number of evaluations": min(nfe, default=0)})
    check_finite(guidance)
    model = load(source, device)
    labels = model.labels(n)
    real = load_reference(reference, "test", model.device) if reference else None
    lines = compare_model_solvers(
        model, labels, real, Path(folder), name=Path(source).name, solvers=solvers, nfe=nfe, grids=grids,
        guidance=guidance, long=long, seed=seed, progress=progress,
    )  # fmt: skip
    write_solver_comparison(lines, Path(folder))
    return lines


def fit_v3(
    source: Source, file: Source, *, n: int = 1024, intervals: int = 120, guidance: float = 1.0, seed: int = 0,
    device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Writes the statistics that DPM-Solver-v3 needs of a class-conditional model, over ``n`` of its own samples. The
    solver looks for them in ``statistics.safetensors``, or ``statistics-2.safetensors`` for guidance 2, beside the
    model's weights, and uses them at this guidance alone. Continues an interrupted call."""
    check_at_least(1, n=n, intervals=intervals)
    check_finite(guidance)
    check_writable(file)
    model = load(source, device)
    labels = model.labels(n)
    x0 = generate(model, labels, SamplingConfig("heun", 16, guidance, seed=SEARCH_SEED + seed)).x0
    condition = Condition.of_labels(labels, model.config.classes)
    estimate_statistics(
        model.denoiser, x0.to(model.device), condition.to(model.device), Path(file), guidance=Guidance(guidance),
        intervals=intervals, seed=seed, progress=progress,
    )  # fmt: skip


def fit_dc(
    source: Source, file: Source, *, steps: Sequence[int], guidance: Sequence[float], order: int = 2, n: int = 32,
    grid: str = "time", seed: int = 0, device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Searches DC-Solver's ratios for every number of steps and guidance scale on a grid, against runs with twenty
    times the steps. The solver looks for them in ``dc_solver.json`` beside the model's weights."""
    check_at_least(1, n=n, order=order, **{"a number of steps": min(steps, default=0)})
    check_finite(*guidance)
    check_writable(file)
    model = load(source, device)
    weights = weights_hash(model.denoiser)
    labels = model.labels(n)
    condition = Condition.of_labels(labels, model.config.classes).to(model.device)
    noise = SampleNoise(SEARCH_SEED + seed, range(n), model.config.shape, model.device)()
    found: list[SearchedRatios] = []
    wanted = [(count, scale) for scale in guidance for count in steps]
    for done, (count, scale) in enumerate(wanted, start=1):
        times = plan(model, SamplingConfig("unipc_2", count, grid=grid)).times
        predict = Predictor(model.denoiser, condition, Guidance(scale))
        x = predict.nodes(times)[0].sigma * noise
        ratios = search_ratios(predict, x, times, reference_states(predict, x, times), order=order)
        found.append(SearchedRatios(steps=count, guidance=scale, order=order, ratios=ratios, grid=grid, model=weights))
        if progress is not None:
            progress(done, len(wanted))
    write_text(json.dumps([one.model_dump() for one in found], indent=1) + "\n", Path(file))


def check_at_least(smallest: int, **values: int) -> None:
    """Raises ``UserError`` that names the first of ``values`` below ``smallest``."""
    for name, value in values.items():
        if value < smallest:
            raise UserError(f"{name} must be at least {smallest}, got {value}.")


def check_finite(*guidance: float) -> None:
    """Raises ``UserError`` on a guidance scale that is not a finite number."""
    for scale in guidance:
        if not math.isfinite(scale):
            raise UserError(f"guidance must be a finite number, got {scale}.")
