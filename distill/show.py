"""What a config composes: the method in its paper's notation, its updates and their evaluations, its settings."""

from __future__ import annotations

import inspect
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fewstep.distill.bench import calls_of
from fewstep.distill.config import Config, StageConfig, objective_module
from fewstep.distill.run import Run
from fewstep.distill.update import Anchor, Due

CYCLES = 12  # over which evaluations are averaged: rollouts are of random length


@dataclass(frozen=True)
class UpdateRow:
    """An update of a stage, due at ``share`` of its steps. ``evaluations`` are forward passes by role, for a sample and
    update: (without, with) gradient."""

    name: str
    roles: tuple[str, ...]
    due: Due
    share: float
    evaluations: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class StageView:
    """A stage: the objective's own words, its updates, and (setting, here, default, published) where something was
    published or the setting is not the default."""

    text: str
    updates: list[UpdateRow]
    settings: list[tuple[str, str, str, str]]

    @property
    def evaluations_a_step(self) -> float:
        """Forward passes a sample and step, over all roles and updates."""
        return sum(row.share * sum(map(sum, row.evaluations.values())) for row in self.updates)


def show(config: Config) -> list[StageView]:
    """Views of all stages. Builds the run in memory, with a small batch; raises ``UserError`` as training would."""
    views = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config.model_copy(update={"batch": 4}), Path(folder), torch.device("cpu"))
        for number, stage in enumerate(config.stages):
            if number:
                run.enter(number)
            doc = inspect.getdoc(objective_module(stage.objective.name)) or ""
            views.append(StageView(doc, _rows(run), _settings(config, stage)))
    return views


def _settings(config: Config, stage: StageConfig) -> list[tuple[str, str, str, str]]:
    objective = stage.objective
    defaults = dict(type(objective)(name=objective.name))
    here = dict(objective) | {f"{name}.lr": role.lr for name, role in stage.roles.items()}
    here["batch"] = config.batch * config.accumulate
    told = [name for name in here if name in objective.published or here[name] != defaults.get(name, here[name])]
    return [(name, str(here[name]), str(defaults.get(name, "")), objective.published.get(name, "")) for name in told]


def _rows(run: Run) -> list[UpdateRow]:
    """The updates of the run's stage, with the evaluations of some cycles of them."""
    updates = run.objective.updates
    first, cycle = max(update.due.start for update in updates), max(update.due.every for update in updates)
    samples: dict[str, Counter[tuple[str, bool]]] = {update.name: Counter() for update in updates}
    times: Counter[str] = Counter()
    for step in range(first, first + CYCLES * cycle):
        kept: dict[int, dict[str, Anchor]] = {0: {}}
        for update in updates:
            if update.due(step):
                times[update.name] += 1
                for call in calls_of(run, partial(run.loop.update, update, step, kept)):
                    samples[update.name][call.role, call.graph] += len(call.x)
    rows = []
    for update in updates:
        seen, size = samples[update.name], times[update.name] * run.config.batch
        evaluations = {
            role: (seen[role, False] / size, seen[role, True] / size) for role in dict.fromkeys(r for r, _ in seen)
        }
        rows.append(
            UpdateRow(update.name, update.roles, update.due, times[update.name] / (CYCLES * cycle), evaluations)
        )
    return rows
