"""Several methods from one teacher at one budget: the same number of network evaluations in training, several seeds.

What is counted are samples that go forward through any role's network, with or without gradient, in every update and in
every stage: ``show`` measures how many a step makes. Runs that are finished are kept, and unfinished ones go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fewstep.distill.config import Config, describe, parse_config, read_settings
from fewstep.distill.run import run_config
from fewstep.distill.show import show
from fewstep.distill.stage import Frozen
from fewstep.errors import UserError


class Entrant(Frozen):
    """A method: its stages without their ``steps``, its ``data`` if it needs more than labels, and how many evaluations
    that data has ``spent`` already (of the teacher, on pairs)."""

    stages: list[dict[str, Any]] = Field(min_length=1)
    data: dict[str, Any] = Field(default_factory=dict)
    spent: int = Field(0, ge=0)


class Shootout(Frozen):
    """``base`` holds the settings that all runs share, ``methods`` those of each, whose ``steps`` are set from
    ``evaluations`` (of samples, over all stages). Students are scored on ``n`` samples with each of ``steps``, or if
    there are none with the number of steps that they were made for."""

    out: str
    evaluations: int = Field(ge=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    steps: tuple[int, ...] = ()
    n: int = Field(10_000, ge=20)
    reference: str = "fashion"
    base: dict[str, Any]
    methods: dict[str, Entrant] = Field(min_length=1)


def load_shootout(path: str | Path, overrides: Sequence[str] = ()) -> Shootout:
    """Reads the YAML file and ``key=value`` overrides. Raises ``UserError`` as ``load_config`` does."""
    raw, file, overridden = read_settings(path, overrides)
    try:
        return Shootout.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(describe(error, Shootout, "", file, overridden))) from error


def entry(shootout: Shootout, method: str) -> Config:
    """The run of a method, each stage with an equal share of the evaluations, however many seeds there are.

    Raises ``UserError`` if the settings are wrong or the budget is less than a step a stage.
    """
    entrant = shootout.methods[method]
    stages = entrant.stages
    raw = {**shootout.base, "data": entrant.data, "out": shootout.out}
    origin = f"the shootout's method {method!r}"
    probe = parse_config({**raw, "stages": [{**stage, "steps": 1} for stage in stages]}, origin)
    share = (shootout.evaluations - entrant.spent) / len(stages) / probe.batch / probe.accumulate
    steps = [round(share / view.evaluations_a_step) for view in show(probe)]
    if min(steps) < 1:
        raise UserError(f"{shootout.evaluations} evaluations are less than one step of {method!r}.")
    return parse_config(
        {**raw, "stages": [{**stage, "steps": n} for stage, n in zip(stages, steps, strict=True)]}, origin
    )


def run_all(shootout: Shootout, train: Callable[[Config, Path | None], object]) -> list[tuple[str, int, Path]]:
    """Trains what is not finished by ``train(config, resume)``; returns (method, seed, run folder), seeds outermost, so
    that an interrupted shootout has every method before it has a second seed of one.

    Raises ``UserError`` where a folder holds a run of other settings.
    """
    configs = {method: entry(shootout, method) for method in shootout.methods}
    runs = []
    for seed in shootout.seeds:
        for method, config in configs.items():
            wanted = config.model_copy(update={"out": f"{shootout.out}/{method}-{seed}", "seed": seed})
            folder = Path(wanted.out)
            started = (folder / "config.yaml").is_file()
            if started and run_config(folder) != wanted:
                raise UserError(f"{folder} is a run of other settings than the shootout's; choose another out.")
            if not (folder / "student" / "config.json").is_file():
                train(wanted, folder if started else None)
            runs.append((method, seed, folder))
    return runs


def curve(shootout: Shootout, method: str, folder: Path) -> list[tuple[float, float]]:
    """(training evaluations so far, validation) of a finished run."""
    config = run_config(folder)
    costs = [view.evaluations_a_step * config.batch * config.accumulate for view in show(config)]
    ends = [0, *accumulate(stage.steps for stage in config.stages)]
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found = {line["step"]: line["validation"] for line in lines if "validation" in line}

    def evaluations(step: int) -> float:
        inside = (min(max(step - first, 0), last - first) for first, last in pairwise(ends))
        return shootout.methods[method].spent + sum(n * cost for n, cost in zip(inside, costs, strict=True))

    return [(evaluations(step), value) for step, value in found.items()]
