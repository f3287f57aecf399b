"""The student in a checkpoint, as a model: to sample, score or export a run that is not finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import reading
from fewstep.distill.checkpoint import NAME, read_checkpoint, read_newest
from fewstep.distill.trainer import Trainer
from fewstep.models.loading import Model, load_model, model_of
from fewstep.models.model_config import ModelConfig, Size
from fewstep.models.saving import bound_to_base


def student_record(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint's state says about the student: its config, and the roles whose networks it has."""
    config = bound_to_base(trainer.student_config).model_dump(mode="json", exclude_none=True)
    return {"config": config, "roles": [role for role, _ in trainer.objective.experts]}


def is_checkpoint(folder: Path) -> bool:
    return NAME.fullmatch(folder.name) is not None and (folder / "state.json").is_file()


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run that is not damaged. Raises ``UserError`` if there is none."""
    return read_newest(run / "checkpoints")[0]


def student_config(checkpoint: Path) -> ModelConfig:
    """The config of a checkpoint's student. Raises ``UserError`` as ``load_student`` does."""
    return _record(checkpoint, read_checkpoint(checkpoint, verify=False)[1])[0]


def load_student(checkpoint: Path, size: Size | None = None, dtype: Any = None) -> Model:
    """The student of a checkpoint with its averaged weights, loaded as ``load_model`` does. Raises ``UserError`` if the
    checkpoint is damaged or from an earlier version."""
    tensors, state = read_checkpoint(checkpoint)
    config, roles, teacher = _record(checkpoint, state)

    def read() -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for k, role in enumerate(roles):
            prefix = f"experts.{k}." if len(roles) > 1 else ""
            own = dict(_averaged(role, tensors)) or _frozen(role, teacher, config)
            weights |= {prefix + name: tensor for name, tensor in own.items()}
        return weights

    return model_of(config, read, checkpoint / "state.json", size=size, dtype=dtype)


def _record(checkpoint: Path, state: Mapping[str, Any]) -> tuple[ModelConfig, list[str], str | None]:
    """The student's config, the roles whose networks it has, and the run's teacher."""
    if "student" not in state:
        raise UserError(
            f"{checkpoint} does not say how its student is sampled: it is from an earlier version of fewstep. Resume "
            "the run: its next checkpoint does."
        )
    with reading(checkpoint / "state.json", "state of a checkpoint"):
        config = ModelConfig.model_validate(state["student"]["config"])
        return config, list(state["student"]["roles"]), state["run"]["config"]["teacher"]


def _averaged(role: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a role's backbone; those that are averaged, averaged."""
    start = f"{role}/weights/backbone."
    for key in tensors:
        if key.startswith(start):
            name = key.removeprefix(start)
            average = f"{role}/average/backbone.{name}"
            yield name, tensors[average if average in tensors else key]


def _frozen(role: str, teacher: str | None, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a role that is not trained, which are the teacher's; none of its own under adapters."""
    if config.lora is not None:
        return {}
    if teacher is None:
        raise UserError(f"The student needs the role {role}, whose weights are those of a teacher without a folder.")
    return load_model(teacher, from_file=True).denoiser.backbone.state_dict()
