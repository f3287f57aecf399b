"""Several methods from one teacher at one budget: the same number of network evaluations in training, several seeds.

What is counted are samples that go forward through any role's network, with or without gradient, in every update and in
every stage: ``show`` measures how many a step makes. Runs that are finished are kept, and unfinished ones go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from fewstep.distill.config import Config, find_config, parse_config
from fewstep.distill.run import run_config
from fewstep.distill.show import show
from fewstep.distill.stage import Frozen
from fewstep.errors import UserError


class Shootout(Frozen):
    """``base`` holds the settings that all runs share, ``methods`` the stages of each, whose ``steps`` are set from
    ``evaluations`` (of samples, over all stages). Students are scored with each of ``steps`` on ``n`` samples."""

    out: str
    evaluations: int = Field(ge=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    steps: tuple[int, ...] = (4,)
    n: int = Field(10_000, ge=20)
    reference: str = "fashion"
    base: dict[str, Any]
    methods: dict[str, list[dict[str, Any]]] = Field(min_length=1)


def load_shootout(path: str | Path) -> Shootout:
    """Reads the YAML file. Raises ``UserError`` that names what is wrong in it."""
    file = find_config(path)
    try:
        return Shootout.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{file} is no shootout: {' '.join(str(error).split())}.") from error


def entry(shootout: Shootout, method: str) -> Config:
    """The run of a method with the first seed, each stage with an equal share of the evaluations.

    Raises ``UserError`` if the settings are wrong or the budget is less than a step a stage.
    """
    stages = shootout.methods[method]
    raw = {**shootout.base, "out": shootout.out, "seed": shootout.seeds[0]}
    origin = f"the shootout's method {method!r}"
    probe = parse_config({**raw, "stages": [{**stage, "steps": 1} for stage in stages]}, origin)
    share = shootout.evaluations / len(stages) / probe.batch / probe.accumulate
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
