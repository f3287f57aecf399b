"""Checkpoints: safetensors and JSON only, hashed, written under a temporary name and renamed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, replace_folder, sha256, write_tensors, write_text
from fewstep.core.finite import first_non_finite
from fewstep.distill.roles import Role

NAME = re.compile(r"step-\d+")


def role_tensors(name: str, role: Role) -> dict[str, Tensor]:
    """The state of a trained role: weights, averages, and the optimizer's moments by parameter name."""
    tensors = {f"{name}/weights/{key}": value for key, value in role.module.state_dict().items()}
    tensors |= {f"{name}/average/{key}": value for key, value in role.average.items()}
    if role.optimizer is not None:
        for key, parameter in role.module.named_parameters():
            for moment, value in role.optimizer.state.get(parameter, {}).items():
                # a copy, because 8-bit moments share their code books
                tensors[f"{name}/optimizer/{moment}/{key}"] = torch.as_tensor(value).clone()
        tensors[f"{name}/updates"] = torch.tensor(role.updates)
    return tensors


def restore_role(name: str, role: Role, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``role_tensors``, in place. Raises ``UserError`` if the tensors do not fit the role."""
    own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    weights = {key.removeprefix("weights/"): value for key, value in own.items() if key.startswith("weights/")}
    try:
        role.module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint's {name!r} does not fit this run's network: {str(error).splitlines()[0]}"
        ) from error
    for key in role.average:
        role.average[key].copy_(own[f"average/{key}"])
    if role.optimizer is not None:
        role.updates = int(own["updates"])
        for key, parameter in role.module.named_parameters():
            moments = {
                path.split("/")[1]: value
                for path, value in own.items()
                if path.startswith("optimizer/") and path.split("/", 2)[2] == key
            }
            if moments:
                step = moments.pop("step")  # a host tensor in AdamW, a number in its 8-bit version
                role.optimizer.state[parameter] = {
                    "step": step.item() if "qmap1" in moments else step.clone(),
                    **{moment: value.to(parameter.device) for moment, value in moments.items()},
                }


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes ``folder/step-XXXXXXX`` completely or not at all, then deletes all but the last ``keep``.

    Raises ``UserError`` if it cannot be written, and if a number is not finite: then the ones before stay.
    """
    if (bad := first_non_finite(tensors)) is not None:
        raise UserError(
            f"No checkpoint of step {step} was written: {bad} has numbers that are not finite. Resume from the last "
            "one with a lower learning rate or a lower guidance."
        )
    final = folder / f"step-{step:07d}"
    partial = folder / f".step-{step:07d}.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(tensors, partial / "state.safetensors")
        record = {**state, "step": step, "sha256": sha256(partial / "state.safetensors")}
        record["record_sha256"] = _hash(record)
        write_text(json.dumps(record, indent=2) + "\n", partial / "state.json")
        replace_folder(partial, final)
    except (OSError, UserError) as error:
        raise UserError(f"Cannot write the checkpoint {final}: {error}. Free some space, then use --resume.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path, before: int | None = None) -> list[Path]:
    """The checkpoints, oldest first; with ``before``, those at or before that step."""
    found = sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)
    return [path for path in found if before is None or step_of(path) <= before]


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises ``UserError`` if it is incomplete or a hash does not match."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise UserError(f"{folder} is damaged: state.json contains no settings.")
        if state.get("record_sha256") not in (None, _hash(state)):
            raise UserError(f"{folder} is damaged: the hash of state.json differs.")
        if sha256(folder / "state.safetensors") != state.get("sha256"):
            raise UserError(f"{folder} is damaged: the hash of state.safetensors differs.")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is not a complete checkpoint ({error}).") from error
    return read_tensors(folder / "state.safetensors"), state


def read_newest(folder: Path, before: int | None = None) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]]:
    """The newest checkpoint in ``folder`` that is not damaged, at or before the step ``before``: its path, tensors and
    state, and what is wrong with newer ones.

    Raises ``UserError`` if there is none.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder, before)):
        try:
            return path, *read_checkpoint(path), damaged
        except UserError as error:
            damaged.append(str(error))
    raise UserError(" ".join([*damaged, "No other checkpoint is left: restore one, or train in another folder."]))


def _hash(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a state but for the field that holds it."""
    content = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
