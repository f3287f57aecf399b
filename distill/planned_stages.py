"""The stages of a config, built on the meta device by the code that training uses, and what happens in their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fewstep.core.errors import UserError
from fewstep.core.json_files import read_json_object
from fewstep.distill.build import DTYPES
from fewstep.distill.config import AdapterConfig, Config, NetworkConfig
from fewstep.distill.explain import stand_in_trainer
from fewstep.distill.networks import is_network_folder
from fewstep.distill.roles import Role
from fewstep.distill.snapshots import Snapshot, snapshots
from fewstep.distill.stage import roles_of_stage
from fewstep.distill.stage_checks import require_bfloat16
from fewstep.models.adapters import checkpoint_gradients, share_network
from fewstep.models.attention import set_attention
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import resolve_path
from fewstep.models.skeleton import META, Skeleton, encoded_shapes, skeleton, skeleton_of


@dataclass
class PlannedStage:
    """A stage built on the meta device, and what happens in its steps."""

    number: int
    network: Skeleton
    roles: dict[str, Role]
    frozen: frozenset[str]
    snapshots: frozenset[Snapshot]
    updates: Mapping[str, tuple[str, ...]]


def planned_stages(config: Config) -> Iterator[PlannedStage]:
    network = _network(config)
    before = {"teacher" if config.model is None else "model": Role(network.denoiser)}
    others = {name: partial(_other, config, settings) for name, settings in config.networks.items()}
    trainer = stand_in_trainer(config.model_copy(update={"accumulate": min(2, config.accumulate)}))  # more repeat it
    rows = {name: torch.zeros(1, *shape, dtype=dtype, device=META)
            for name, (shape, dtype) in network.condition.items() if name != "guidance"}  # fmt: skip
    for number, stage in enumerate(config.stages):
        if number:
            trainer.start_stage(number)
        with META:
            networks = stage.objective.networks(network.denoiser, network.shape, Condition(rows))
            configs = {name: role.model_copy(update={"optimizer": "adamw"}) for name, role in stage.roles.items()}
            roles = roles_of_stage(before, configs, stage.freeze, networks, others)
        frozen = roles.keys() - stage.roles.keys() - dict(trainer.objective.experts).keys()
        updates = {update.name: update.roles for update in trainer.objective.updates}
        yield PlannedStage(number, network, roles, frozenset(frozen), snapshots(trainer), updates)
        before = roles


def _network(config: Config) -> Skeleton:
    """The teacher, or the new network, as ``build_inputs`` prepares it."""
    if config.model is not None:
        return skeleton_of(config.model)
    if config.teacher is None:
        raise UserError("The config has neither teacher (to distil) nor model (to pretrain); give one of them.")
    network = skeleton(config.teacher, config.size, DTYPES[config.weights])
    require_bfloat16(config, network.denoiser)
    shapes = encoded_shapes(config.data.path if config.data.kind == "prompts" else None)
    condition = {name: (shapes.get(name, shape), dtype) for name, (shape, dtype) in network.condition.items()}
    denoiser = network.denoiser
    denoiser.record_features([path for stage in config.stages for path in stage.objective.teacher_features])
    return Skeleton(_prepared(denoiser, config, config.adapters), network.shape, condition)


def _other(config: Config, settings: NetworkConfig) -> Denoiser:
    """One of the networks from which roles start, as ``load_networks`` returns it."""
    assert config.teacher is not None
    if settings.checkpoint is None:
        denoiser = skeleton(config.teacher, config.size, torch.float32, settings.backbone or {}).denoiser
    elif is_network_folder(settings.checkpoint):
        network = read_json_object(resolve_path(settings.checkpoint) / "config.json")
        denoiser = skeleton(config.teacher, config.size, torch.float32, network).denoiser
    else:
        denoiser = skeleton(settings.checkpoint, config.size, torch.float32).denoiser
    return _prepared(denoiser, config)


def _prepared(denoiser: Denoiser, config: Config, adapters: AdapterConfig | None = None) -> Denoiser:
    set_attention(denoiser.backbone, "math" if config.attention == "math" else "sdpa", torch.device("cpu"))
    if adapters is not None:
        share_network(denoiser, **dict(adapters))
    if config.gradient_checkpointing:
        checkpoint_gradients(denoiser.backbone)
    return denoiser
