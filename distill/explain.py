"""Explains a config without weights, data or network: equations, updates, evaluations per step, and differences from
the published settings.

The stages are built with tiny stand-in networks and run for some steps, so that the counts are those of training.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import TrainingInputs
from fewstep.distill.config import Config, StageConfig
from fewstep.distill.data.batch import Batch
from fewstep.distill.roles import Role, Roles
from fewstep.distill.trainer import Trainer
from fewstep.distill.update import Every, StudentSample
from fewstep.models.backbone import Backbone, Past
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.schedules import RectifiedFlow

CYCLES = 12  # evaluations are averaged over these, because rollouts have random lengths
BATCH, SHAPE = 4, (4, 1, 2, 2)  # a video of one frame, which is an image to all that does not need a video


@dataclass(frozen=True)
class UpdateExplanation:
    """An update of a stage, due at ``share`` of its steps. ``evaluations`` are forward passes per sample and update, by
    role: (without, with) gradient."""

    name: str
    roles: tuple[str, ...]
    due: Every
    share: float
    evaluations: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class StageExplanation:
    """A stage: the objective's description, its updates, and (setting, here, default, published) for settings that have
    a published value or differ from the default."""

    text: str
    updates: list[UpdateExplanation]
    settings: list[tuple[str, str, str, str]]

    @property
    def evaluations_per_step(self) -> float:
        """Forward passes per sample and step, over all roles and updates."""
        return sum(row.share * sum(map(sum, row.evaluations.values())) for row in self.updates)

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types."""
        names = ("setting", "here", "default", "published")
        return {
            "text": self.text,
            "updates": [asdict(update) | {"due": update.due.n} for update in self.updates],
            "evaluations_per_step": self.evaluations_per_step,
            "settings": [dict(zip(names, row, strict=True)) for row in self.settings],
        }


def explain(config: Config) -> list[StageExplanation]:
    """All stages of a config. Raises ``UserError``, as training does, on roles and settings that do not fit."""
    trainer = stand_in_trainer(config)
    explanations = []
    for number, stage in enumerate(config.stages):
        if number:
            trainer.start_stage(number)
        explanations.append(
            StageExplanation(stage.objective.description(), _updates(trainer), _settings(config, stage))
        )
    return explanations


# --- stand-ins --------------------------------------------------------------------------------------------------------


class StandIn(Backbone):
    """A tiny network with all features that an objective may need."""

    feature_layers = ("layer",)
    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 1, 1)

    def get_submodule(self, target: str) -> nn.Module:
        """Returns the one layer for every path."""
        return self.layer

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, *, by_frame: bool = False) -> Tensor:
        """``by_frame`` is for hooks, which otherwise see no difference."""
        out: Tensor = x_t + self.layer(x_t[:, :1])
        return out

    def after(self, past: Past | None, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Past]:
        return self(x_t, t, condition, by_frame=True), ()

    def with_step_counts(self, most: int) -> StandIn:
        return copy.deepcopy(self)


@dataclass(frozen=True)
class StandInData:
    """A source of labels and of the tensors that the stages' objectives need."""

    tensors: frozenset[str]

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        condition = Condition.of_labels(random.integers(size, 2), 2)
        return Batch(size, SHAPE, condition, {name: random.normal((size, *SHAPE)) for name in self.tensors})


def stand_in_trainer(config: Config) -> Trainer:
    """A trainer of the config's stages with stand-ins for the network and the data."""
    schedule = RectifiedFlow()
    origin = "model" if config.teacher is None and config.model is not None else "teacher"
    tensors = frozenset(name for stage in config.stages for name in stage.objective.tensors)
    denoiser = Denoiser(StandIn(), schedule)
    denoiser.record_features([path for stage in config.stages for path in stage.objective.teacher_features])
    model_config = ModelConfig(backbone={"name": "stand-in"}, shape=SHAPE, classes=2)
    others = {name: Model(denoiser=Denoiser(StandIn(), schedule), config=model_config) for name in config.networks}
    inputs = TrainingInputs({origin: Role(denoiser)}, {"data": StandInData(tensors)}, model_config, networks=others)
    plain = {"batch": BATCH, "adapters": None, "offload": False, "cuda_graphs": False, "precision": "float32"}
    return Trainer(config.model_copy(update=plain), inputs, torch.device("cpu"))


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One forward pass of a role's backbone in a training step; ``graph``: it was recorded for a backward pass."""

    role: str
    backbone: nn.Module
    x: Tensor
    t: Tensor
    condition: Condition
    graph: bool


def evaluations_of(roles: Roles, work: Callable[[], object]) -> list[Evaluation]:
    """The network evaluations in ``work`` through ``roles``, in order."""
    evaluations: list[Evaluation] = []

    def hook(role: str, module: nn.Module, inputs: tuple[Tensor, Tensor, Condition], output: Tensor) -> None:
        x, t, condition = inputs
        evaluations.append(Evaluation(role, module, x.detach(), t, condition, torch.is_grad_enabled()))

    denoisers = {name: role.module for name, role in roles.items() if isinstance(role.module, Denoiser)}
    handles = [module.backbone.register_forward_hook(partial(hook, name)) for name, module in denoisers.items()]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return evaluations


def _updates(trainer: Trainer) -> list[UpdateExplanation]:
    """The updates of the current stage, with their evaluations averaged over some cycles."""
    updates = trainer.objective.updates
    steps = CYCLES * max(update.due.n for update in updates)
    samples: dict[str, Counter[tuple[str, bool]]] = {update.name: Counter() for update in updates}
    runs: Counter[str] = Counter()
    for step in range(steps):
        shared: dict[int, dict[str, StudentSample]] = {0: {}}
        for update in updates:
            if update.due(step):
                runs[update.name] += 1
                run = partial(trainer.loop.update, update, step, shared)
                for evaluation in evaluations_of(trainer.roles, run):
                    samples[update.name][evaluation.role, evaluation.graph] += len(evaluation.x)
    found = []
    for update in updates:
        counts, size = samples[update.name], runs[update.name] * BATCH
        roles = dict.fromkeys(role for role, _ in counts)
        evaluations = {role: (counts[role, False] / size, counts[role, True] / size) for role in roles}
        found.append(UpdateExplanation(update.name, update.roles, update.due, runs[update.name] / steps, evaluations))
    return found


def _settings(config: Config, stage: StageConfig) -> list[tuple[str, str, str, str]]:
    objective = stage.objective
    fields = type(objective).model_fields.items()
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    here = dict(objective) | {f"{name}.lr": role.lr for name, role in stage.roles.items()}
    here["batch"] = config.batch * config.accumulate
    del here["name"]
    shown = [name for name in here if name in objective.published or here[name] != defaults.get(name, here[name])]
    return [(name, str(here[name]), str(defaults.get(name, "")), objective.published.get(name, "")) for name in shown]
