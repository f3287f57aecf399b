"""Several objectives from one teacher at one budget: equal numbers of network evaluations in training, several seeds.

An evaluation is one sample passed forward through the network of any role, with or without gradient, in any update of
any stage. Finished runs are kept, and unfinished ones are resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fewstep.api.evaluate import evaluate, known_teacher_scores
from fewstep.api.models import Source
from fewstep.api.train import train_run
from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.core.json_files import read_json_lines
from fewstep.distill.callback import Callback
from fewstep.distill.config import Config
from fewstep.distill.config_files import describe, parse_config, read_settings
from fewstep.distill.explain import explain
from fewstep.distill.run_folder import run_config
from fewstep.distill.stage import BaseConfig
from fewstep.eval.report.frontier import draw_frontier
from fewstep.eval.score_files import Score, read_scores
from fewstep.models.loading import load_model


class MethodConfig(BaseConfig):
    """A method: its stages without their ``steps``, its ``data`` if they are not those of ``base``, and the number of
    evaluations ``spent`` on that data (of the teacher, on ODE pairs)."""

    stages: list[dict[str, Any]] = Field(min_length=1)
    data: dict[str, Any] = Field(default_factory=dict)
    spent: int = Field(0, ge=0, le=10**15)


class ObjectivesBenchmark(BaseConfig):
    """``base`` holds the settings that all runs share and ``methods`` those of each; the numbers of training steps
    follow from the budget of ``evaluations`` (over all stages). Students are scored on ``n`` samples with each of
    ``steps``, by default with their own number of steps."""

    out: str
    evaluations: int = Field(ge=1, le=10**15)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0, 1, 2), min_length=1)
    steps: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = ()
    n: int = Field(10_000, ge=20, le=10**7)
    reference: str | None = None
    base: dict[str, Any]
    methods: dict[str, MethodConfig] = Field(min_length=1)


def load_benchmark(path: str | Path, overrides: Sequence[str] = ()) -> ObjectivesBenchmark:
    """Reads the YAML file and ``key=value`` overrides. Raises ``UserError`` as ``load_config`` does."""
    raw, file, overridden = read_settings(path, overrides)
    try:
        return ObjectivesBenchmark.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(describe(error, ObjectivesBenchmark, "", file, overridden))) from error


def run_config_of(benchmark: ObjectivesBenchmark, method: str) -> Config:
    """The run of a method, each stage with an equal share of the evaluations, however many seeds there are.

    Raises ``UserError`` if the settings are wrong or the budget is less than one step per stage.
    """
    entry = benchmark.methods[method]
    stages = entry.stages
    raw = {**benchmark.base, **({"data": entry.data} if entry.data else {}), "out": benchmark.out}
    origin = f"the benchmark's method {method!r}"
    probe = parse_config({**raw, "stages": [{**stage, "steps": 1} for stage in stages]}, origin)
    share = (benchmark.evaluations - entry.spent) / len(stages) / probe.batch / probe.accumulate
    steps = [round(share / stage.evaluations_per_step) for stage in explain(probe)]
    if min(steps) < 1:
        raise UserError(f"{benchmark.evaluations} evaluations are less than one step of {method!r}.")
    return parse_config(
        {**raw, "stages": [{**stage, "steps": n} for stage, n in zip(stages, steps, strict=True)]}, origin
    )


def run_all(
    benchmark: ObjectivesBenchmark, train: Callable[[Config, Path | None], object]
) -> list[tuple[str, int, Path]]:
    """Trains unfinished runs by ``train(config, resume)`` and returns (method, seed, run folder). Seeds are the outer
    loop, so that an interrupted benchmark has every method before a second seed of one.

    Raises ``UserError`` if a folder contains a run of other settings.
    """
    configs = {method: run_config_of(benchmark, method) for method in benchmark.methods}
    runs = []
    for seed in benchmark.seeds:
        for method, config in configs.items():
            wanted = config.model_copy(update={"out": f"{benchmark.out}/{method}-{seed}", "seed": seed})
            folder = Path(str(wanted.out))
            started = (folder / "config.yaml").is_file()
            if started and run_config(folder) != wanted:
                raise UserError(f"{folder} is a run of other settings than the benchmark's; choose another out.")
            if not (folder / "student" / "config.json").is_file():
                train(wanted, folder if started else None)
            runs.append((method, seed, folder))
    return runs


def logged(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a finished run's ``metrics.jsonl``. Raises ``UserError`` if there are none."""
    lines, _ = read_json_lines(folder / "metrics.jsonl")
    lines = [line for line in lines if {"step", "seconds"} <= line.keys()]
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'} contains no log of training; delete {folder} to train again.")
    return lines


def curve(benchmark: ObjectivesBenchmark, method: str, folder: Path) -> list[tuple[float, float]]:
    """(training evaluations so far, validation) of a finished run."""
    config = run_config(folder)
    costs = [stage.evaluations_per_step * config.batch * config.accumulate for stage in explain(config)]
    ends = [0, *accumulate(stage.steps for stage in config.stages)]
    found = {line["step"]: line["validation"] for line in logged(folder) if "validation" in line}

    def evaluations(step: int) -> float:
        inside = (min(max(step - first, 0), last - first) for first, last in pairwise(ends))
        return benchmark.methods[method].spent + sum(n * cost for n, cost in zip(inside, costs, strict=True))

    return [(evaluations(step), value) for step, value in found.items()]


def bench_objectives(
    config: Source, *overrides: str, progress: Callable[[str], Callback] | None = None, device: str = "auto"
) -> list[Score]:
    """Trains and scores every method and seed of a benchmark file, and writes ``objectives.json``, ``curves.json``
    (validation over training evaluations, by method and seed) and ``frontier.png`` into its folder.

    ``overrides`` are ``"key=value"`` strings, for example ``seeds=[0]`` for a first look. A score's ``model`` is the
    method and its ``seed`` that of the training, so that tables show mean and deviation. ``progress(run name)`` returns
    a run's callback.
    """
    settings = load_benchmark(config, overrides)

    def train(config: Config, resume: Path | None) -> None:
        train_run(config, resume, callbacks=[progress(Path(str(config.out)).name)] if progress else [], progress=False)

    runs = run_all(settings, train)
    entries = []
    several_models = {"source": None, "source_sha256": None}  # one per seed, whose mean the tables show
    curves: dict[str, list[list[tuple[float, float]]]] = {method: [] for method in settings.methods}
    for method, seed, folder in runs:
        curves[method].append(curve(settings, method, folder))
        file = folder / "eval.json"
        own = [score for score in read_scores(file) if score.role == "student"] if file.is_file() else []
        few = load_model(folder / "student").config.few_step
        wanted = settings.steps or ((len(few.times),) if few else ())
        missing = [k for k in wanted if (k, settings.n) not in {(score.steps, score.n) for score in own}]
        if missing:
            own += evaluate(folder, reference=settings.reference, steps=missing, n=settings.n, device=device)
        training = {"training_seconds": logged(folder)[-1]["seconds"], "training_evaluations": settings.evaluations}
        entries += [
            score.model_copy(update=several_models | {"model": method, "seed": seed}).model_dump(exclude_none=True)
            | training
            for score in own
            if score.steps in wanted and score.n == settings.n
        ]
    folder = Path(settings.out)
    write_text(json.dumps(entries, indent=1) + "\n", folder / "objectives.json")
    write_text(json.dumps(curves) + "\n", folder / "curves.json")
    scores = read_scores(folder / "objectives.json")
    teachers = known_teacher_scores(runs[0][2], {scores[0].features_sha256})
    draw_frontier([*scores, *teachers], curves, folder / "frontier.png")
    return scores
