"""Stages: warm-ups, phases, experts, step halving and distil-then-prefer are one concept, run one after the other."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from fewstep.core.errors import UserError, nearest
from fewstep.core.registry import dotted_name
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import Objective
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.quantized import require_bitsandbytes


class BaseConfig(BaseModel):
    """Base of every piece of configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


@dataclass(frozen=True)
class StageContext:
    """Where an objective trains: the ``number`` of its stage, the stage's ``first_step`` and its length in ``steps``."""

    number: int
    first_step: int
    steps: int


class ObjectiveConfig(BaseConfig):
    """Base of an objective's settings, with what it asks of its stage.

    ``published``: the values of the paper or its code in words, by setting (also ``batch``, ``ROLE.lr``), for ``show``.
    """

    published: ClassVar[Mapping[str, str]] = MappingProxyType({})
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, settings: Any) -> Any:
        """The name under which a config can give this class: its file's for the built-in ones, else a dotted name."""
        if isinstance(settings, dict) and not settings.get("name"):
            package, _, file = cls.__module__.rpartition(".")
            builtin = package == "fewstep.distill.objectives"
            return {**settings, "name": file if builtin else dotted_name(cls)}
        return settings

    @classmethod
    def description(cls) -> str:
        """Equations and updates in the words of the docstring, of the class or of its module."""
        return inspect.cleandoc(vars(cls).get("__doc__") or sys.modules[cls.__module__].__doc__ or "")

    @property
    def needs(self) -> frozenset[str]:
        """The roles that it reads."""
        return frozenset({"teacher", "student", "fake"})

    @property
    def tensors(self) -> frozenset[str]:
        """The tensors, besides the condition, that its batches must bring: none for a data-free method."""
        return frozenset()

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The modules of the teacher's network, and of its copies, whose outputs it reads as features."""
        return ()

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        """Networks of its own, by the role that starts from them (``init: new``); ``condition`` has one row."""
        return {}

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        """The objective of these settings for the roles of a stage."""
        raise NotImplementedError


class MatchingConfig(ObjectiveConfig):
    """Base of the settings of distribution matching: the teacher is read with ``guidance`` (w), and the fake score is
    updated ``critic_updates`` times for one update of the student."""

    guidance: float = 2.0
    critic_updates: int = Field(5, ge=1)


class RoleConfig(BaseConfig):
    """How a trained role starts and learns.

    ``init`` names the role that it copies (``teacher``, or ``student`` of the stage before), ``model`` for a freshly
    initialised network, ``new`` for one that the objective makes (a discriminator), or ``keep`` to go on with what the
    role was; ``full_finetune`` makes it a copy even where the run has adapters. The learning rate is warmed up linearly over
    ``warmup`` updates and then constant, or falls to zero as a cosine over the updates that the stage gives the role.
    """

    init: str = "teacher"
    full_finetune: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    ema: float = Field(0.0, ge=0, lt=1)


def learning_rate(config: RoleConfig, updates: int) -> Callable[[int], float]:
    """The factor on ``config.lr`` at the n-th of ``updates`` updates of the role."""

    def factor(n: int) -> float:
        warm = min(1.0, (n + 1) / (config.warmup + 1))
        return warm * (
            0.5 + 0.5 * math.cos(math.pi * min(1.0, n / max(1, updates))) if config.lr_schedule == "cosine" else 1.0
        )

    return factor


def make_role(module: nn.Module, config: RoleConfig) -> Role:
    """A trained role with its optimizer (AdamW, its moments in 8 bits if asked) over ``module``'s parameters, at a
    constant rate so far."""
    adamw = torch.optim.AdamW if config.optimizer == "adamw" else require_bitsandbytes().optim.AdamW8bit
    optimizer = adamw(module.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr
    return Role(module, optimizer, ema_decay=config.ema)


def enter_stage(
    before: Mapping[str, Role],
    configs: Mapping[str, RoleConfig],
    freeze: Mapping[str, str],
    networks: Mapping[str, nn.Module] = MappingProxyType({}),
) -> dict[str, Role]:
    """The roles of the next stage: frozen copies first (``freeze`` maps new name -> role), then the trained ones.

    A role copied from a trained one takes its averaged weights. Roles not named stay, frozen.
    """

    def source(name: str, wanted_by: str) -> Role:
        if name not in before:
            raise UserError(
                f"The role {wanted_by!r} starts from {name!r}, which does not exist here{nearest(name, before)}."
            )
        return before[name]

    def duplicate(role: Role, full_finetune: bool = False) -> nn.Module:
        with role.averaged():
            module = role.module
            if not full_finetune or not isinstance(module, Denoiser) or not isinstance(module.backbone, AdapterView):
                return copy.deepcopy(module)
            network = module.backbone.merged().requires_grad_(True)
            return Denoiser(network, module.schedule, module.kind, style=module.style).eval()

    roles = {name: Role(role.module) for name, role in before.items()}
    for name, origin in freeze.items():
        roles[name] = Role(duplicate(source(origin, name)))
    for name, config in configs.items():
        if config.init == "keep":
            roles[name] = make_role(source(name, name).module, config)
        elif config.init == "new":
            if name not in networks:
                raise UserError(f"The objective makes no network {name!r}{nearest(name, networks)}; init is wrong.")
            roles[name] = make_role(networks[name], config)
        else:
            roles[name] = make_role(duplicate(source(config.init, name), config.full_finetune), config)
    return roles
