"""Stages: one concept for warm-ups, phases, experts, step-count halving and preference tuning after distillation."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator, model_validator
from torch import nn

from fewstep.core.errors import UserError, nearest
from fewstep.core.registry import dotted_name
from fewstep.distill import sharding
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import Objective
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.quantized import require_bitsandbytes

MAX_STEPS, MAX_COUNT, MAX_GUIDANCE, MAX_WEIGHT = 10**9, 10**6, 1e3, 1e9  # beyond any sensible value
Fraction = Annotated[float, Field(ge=0, lt=1)]


class BaseConfig(BaseModel):
    """Base class of configs: immutable; an unknown key, a NaN, an infinite number, and a text or a truth value for a
    number are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _not_converted(cls, given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Refuses what pydantic would convert: ``"3"`` or ``true`` to a number, ``"yes"`` or 1 to a truth value."""
        result = validate(given)
        if _converted(given, result):
            wanted = "true or false" if isinstance(result, bool) else "a number, neither a text nor a truth value"
            raise ValueError(f"input should be {wanted}")
        return result


def _converted(given: Any, result: Any) -> bool:
    """Whether a number or truth value in ``result`` was something else in ``given``."""
    if isinstance(result, bool):
        return not isinstance(given, bool)
    if isinstance(result, int | float):
        return isinstance(given, bool | str)
    if isinstance(result, tuple | list) and isinstance(given, tuple | list):
        return any(map(_converted, given, result))
    return False


@dataclass(frozen=True)
class StageContext:
    """The stage that an objective is built for: its ``number``, its ``first_step``, and its length in ``steps``."""

    number: int
    first_step: int
    steps: int


class ObjectiveConfig(BaseConfig):
    """Base class of objectives: their settings, their requirements, and ``build``.

    ``published`` holds the values of the paper or its code as text, by setting (also ``batch``, ``ROLE.lr``), for
    ``fewstep explain``.
    """

    published: ClassVar[Mapping[str, str]] = MappingProxyType({})
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, settings: Any) -> Any:
        """Fills in the name by which configs refer to this class: the file's for built-in ones, else a dotted name."""
        if isinstance(settings, dict) and not settings.get("name"):
            package, _, file = cls.__module__.rpartition(".")
            builtin = package == "fewstep.distill.objectives"
            return {**settings, "name": file if builtin else dotted_name(cls)}
        return settings

    @classmethod
    def description(cls) -> str:
        """The docstring of the class or of its module: equations and updates."""
        return inspect.cleandoc(vars(cls).get("__doc__") or sys.modules[cls.__module__].__doc__ or "")

    @property
    def needs(self) -> frozenset[str]:
        """The roles that it uses."""
        return frozenset({"teacher", "student", "fake"})

    @property
    def tensors(self) -> frozenset[str]:
        """The tensors that its batches must contain besides the condition: none for a data-free method."""
        return frozenset()

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The modules of the teacher's network, and of its copies, whose outputs it uses as features."""
        return ()

    @property
    def feature_roles(self) -> frozenset[str]:
        """The roles with these features."""
        return frozenset({"teacher", "fake"} if self.teacher_features else ())

    @property
    def own_schedules(self) -> frozenset[str]:
        """The roles that may have another noise schedule than the teacher's: those whose samples it uses at level 0
        alone, and at no time of theirs."""
        return frozenset()

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        """The networks that it creates, by the role that uses them (``init: new``); ``condition`` has one row."""
        return {}

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        """The objective with these settings, for the roles of a stage."""
        raise NotImplementedError


class MatchingConfig(ObjectiveConfig):
    """Base class of distribution matching: the teacher is evaluated with ``guidance`` (w), and the fake score has
    ``critic_updates`` updates per update of the student."""

    guidance: float = Field(2.0, ge=0, le=MAX_GUIDANCE)
    critic_updates: int = Field(5, ge=1, le=MAX_STEPS)


def guidance_of(objective: ObjectiveConfig) -> float:
    """The guidance scale of the teacher that a student is to match: 1, which is off, unless the objective has one."""
    return objective.guidance if isinstance(objective, MatchingConfig) else 1.0


class RoleConfig(BaseConfig):
    """How a trained role starts and learns.

    ``init`` names the role that it copies (``teacher``, or ``student`` of the previous stage), or one of the run's
    ``networks``; ``model`` is a newly initialised network, ``new`` one that the objective creates (a discriminator),
    and ``keep`` continues with the role as it was. ``full_finetune`` makes it a copy even in a run with adapters, as a
    role that starts from one of ``networks`` must be. The learning rate is warmed up linearly over ``warmup`` updates.
    Then it is constant or, with ``lr_schedule: cosine``, falls to zero over the role's updates in the stage. ``ema`` is
    the decay of the weights' moving average.
    """

    init: str = "teacher"
    full_finetune: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = Field(gt=0, le=1)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, le=100)
    warmup: int = Field(0, ge=0, le=MAX_STEPS)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    ema: float = Field(0.0, ge=0, lt=1)


def learning_rate(config: RoleConfig, updates: int) -> Callable[[int], float]:
    """The factor on ``config.lr`` for the n-th of the role's ``updates`` updates."""

    def factor(n: int) -> float:
        warm = min(1.0, (n + 1) / (config.warmup + 1))
        if config.lr_schedule == "constant":
            return warm
        return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, n / max(1, updates))))

    return factor


def make_role(module: nn.Module, config: RoleConfig) -> Role:
    """A trained role with an AdamW optimizer over ``module``'s parameters, with 8-bit moments if configured, fused on
    an accelerator. Its learning rate is constant until ``lr_factor`` is set.

    Half-precision weights become float32, in place: a step of 1e-6 of a weight is below half of bfloat16's spacing, so
    that optimizer, average and ``blend`` would leave most weights as they are. ``Roles`` evaluates them in the run's
    precision.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    if config.optimizer == "adamw":
        on_host = any(parameter.device.type == "cpu" for parameter in module.parameters())
        adamw = partial(torch.optim.AdamW, fused=not on_host)
    else:
        adamw = require_bitsandbytes().optim.AdamW8bit
    optimizer = adamw(module.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr
    return Role(module, optimizer, ema_decay=config.ema)


def roles_of_stage(
    before: Mapping[str, Role],
    configs: Mapping[str, RoleConfig],
    freeze: Mapping[str, str],
    networks: Mapping[str, nn.Module] = MappingProxyType({}),
    others: Mapping[str, Callable[[], nn.Module]] = MappingProxyType({}),
) -> dict[str, Role]:
    """The roles of the next stage: frozen copies first (``freeze`` maps new name -> role), then the trained ones.

    ``networks`` are those that the objective creates, ``others`` return a copy of a network that is no role. A copy of
    a trained role has its averaged weights. Roles that are not named stay, frozen. Raises ``UserError`` if a role to
    start from does not exist.
    """

    def source(name: str, user: str) -> Role:
        if name not in before:
            raise UserError(
                f"The role {user!r} starts from {name!r}, which this stage does not have"
                f"{nearest(name, [*before, *others])}."
            )
        return before[name]

    def duplicate(name: str, user: str, full_finetune: bool = False, trained: bool = True) -> nn.Module:
        if name in others:
            return others[name]()
        role = source(name, user)
        with role.averaged():
            module = role.module
            if not isinstance(module, Denoiser):
                return copy.deepcopy(module)
            if not isinstance(module.backbone, AdapterView):
                dtype = torch.float32 if trained else None
                return sharding.twin(module, dtype) if sharding.is_split(module) else copy.deepcopy(module)
            if not full_finetune:
                return copy.deepcopy(module)
            network = copy.deepcopy(module.backbone.merged()).requires_grad_(True)
            return Denoiser(network, module.schedule, module.kind, style=module.style).eval()

    roles = {name: Role(role.module) for name, role in before.items()}
    for name, origin in freeze.items():
        roles[name] = Role(duplicate(origin, name, trained=False))
    for name, config in configs.items():
        if config.init == "keep":
            roles[name] = make_role(source(name, name).module, config)
        elif config.init == "new":
            if name not in networks:
                raise UserError(f"The objective creates no network {name!r}{nearest(name, networks)}; change its init.")
            roles[name] = make_role(networks[name], config)
        else:
            roles[name] = make_role(duplicate(config.init, name, config.full_finetune), config)
    return roles
