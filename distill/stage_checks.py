"""What must hold for the roles of a stage: each function raises ``UserError`` with what to change."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fewstep.core.errors import UserError, nearest
from fewstep.distill.config import Config, StageConfig
from fewstep.distill.data.batch import Batch
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import Objective
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser


def require_new(stage: StageConfig, number: int, created: Collection[str]) -> None:
    """The networks that the objective creates are those of roles with ``init: new``."""
    for name in created:
        if name in stage.roles and stage.roles[name].init not in ("new", "keep"):
            raise UserError(
                f"stages.{number}.roles.{name}.init = {stage.roles[name].init!r}: the objective "
                f"{stage.objective.name!r} creates this network itself; use init: new."
            )


def require_needs(config: Config, number: int, roles: Mapping[str, Role], batch: Batch) -> None:
    """The stage has the roles and the tensors that its objective needs."""
    settings = config.stages[number].objective
    if missing := settings.needs - set(roles):
        raise UserError(
            f"stages.{number}: the objective {settings.name!r} needs the roles {sorted(settings.needs)}, "
            f"but {sorted(missing)} is missing: add it under roles: or freeze: (known here: {', '.join(roles)})."
        )
    if missing := settings.tensors - set(batch):
        raise UserError(
            f"stages.{number}: the objective {settings.name!r} needs {sorted(missing)} with each condition, and "
            f"data.kind={config.data.kind} provides {sorted(batch) or 'none'}; use real images "
            "(data.kind=folder, npz or dataset, data.path=PATH) or samples (data.kind=tensors, data.path=FILE; "
            "fewstep data ode-pairs creates one). For a text-conditioned teacher, data.kind=prompts with images or "
            "preference pairs (fewstep data encode, fewstep data preferences)."
        )


def require_gpu(config: Config, device: torch.device) -> None:
    """CUDA graphs are recorded on a GPU."""
    if config.cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs: true needs a GPU, and this run is on {device.type}. Leave it out.")


def require_bfloat16(config: Config, teacher: Denoiser) -> None:
    """``weights: bfloat16`` is for teachers that can be loaded so."""
    if config.weights == "bfloat16" and all(p.dtype != torch.bfloat16 for p in teacher.parameters()):
        raise UserError(
            f"weights: bfloat16 does not act: those of {config.teacher} stay as they are stored, and only a diffusers "
            "pipeline is loaded in another type. Leave it out."
        )


def settings_without_effect(config: Config, device: torch.device, processes: int) -> list[str]:
    """Notes on settings that act on other machines alone."""
    idle = {
        "shard: true has no effect in one process.": config.shard and processes == 1,
        "offload: true has no effect on a CPU.": config.offload and device.type == "cpu",
    }
    return [note for note, here in idle.items() if here]


def require_comparable(config: Config, number: int, roles: Mapping[str, Role]) -> None:
    """Networks that are compared at one noisy sample have one noise schedule, and those whose features are used are
    copies of the teacher, for which the discriminator is made."""
    settings, origins = config.stages[number].objective, config.origins(number)
    for name in sorted(settings.feature_roles):
        if origins.get(name) in config.networks:
            raise UserError(
                f"stages.{number}.roles.{name}: the objective {settings.name!r} uses features of this role for its "
                f"discriminator, which is made for the teacher's network, and the role starts from {origins[name]!r}. "
                "Let it start from the teacher, or use the teacher's features if the objective has this setting."
            )
    modules = {name: roles[name].module for name in settings.needs - settings.own_schedules}
    schedules = {name: module.schedule for name, module in modules.items() if isinstance(module, Denoiser)}
    first = min(schedules, key=lambda name: (name != "teacher", name), default="")
    for name in sorted(schedules):
        if schedules[name] != schedules[first]:
            raise UserError(
                f"stages.{number}: the objective {settings.name!r} needs one noise schedule for all roles, but that of "
                f"{name} is {schedules[name]}, and that of {first} is {schedules[first]}. Start the role from a "
                "network with the same schedule, or take an objective that accepts another one of this role."
            )


def require_trained(stage: StageConfig, number: int, objective: Objective) -> None:
    """The roles of a stage are those that its objective trains."""
    trained = {role for update in objective.updates for role in update.roles}
    if unused := sorted(set(stage.roles) - trained):
        raise UserError(
            f"stages.{number}.roles.{unused[0]}: the objective {stage.objective.name!r} does not train this role"
            f"{nearest(unused[0], sorted(trained))}."
        )
    if unknown := trained - set(stage.roles):
        raise UserError(
            f"stages.{number}.roles: the objective trains {sorted(unknown)}, so add it with a learning rate."
        )


def require_one_generator(objective: Objective, roles: Roles) -> None:
    """The experts that generate together predict the same quantity, and all of them or none are adapters."""
    experts = {role: roles.denoiser(role) for role, _ in objective.experts}
    first = next(iter(experts))
    for name, other in experts.items():
        if other.kind != experts[first].kind:
            raise UserError(
                f"The experts {first} and {name} predict different quantities, {experts[first].kind} and {other.kind}: "
                "start them from networks that predict the same."
            )
    adapters = [name for name, expert in experts.items() if isinstance(expert.backbone, AdapterView)]
    if adapters and len(adapters) < len(experts):
        raise UserError(
            f"Of the experts {', '.join(experts)}, {', '.join(adapters)} are the network that adapters share, and the "
            "others are not: they cannot be saved as one model. Leave adapters or full_finetune away."
        )
