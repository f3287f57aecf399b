"""Checkpoints: safetensors and JSON only, hashed, written under a temporary name and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, sha256, write_tensors, write_text
from fewstep.distill.roles import Role


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

    Raises ``UserError`` if it cannot be written.
    """
    final = folder / f"step-{step:07d}"
    partial = folder / f".step-{step:07d}.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(tensors, partial / "state.safetensors")
        record = {**state, "step": step, "sha256": sha256(partial / "state.safetensors")}
        write_text(json.dumps(record, indent=2) + "\n", partial / "state.json")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except OSError as error:
        raise UserError(f"Cannot write the checkpoint {final}: {error}. Free some space, then use --resume.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises ``UserError`` if it is damaged or its hash does not match."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint ({error}). Delete it to resume from the one before."
        ) from error
    if sha256(folder / "state.safetensors") != state.get("sha256"):
        raise UserError(
            f"{folder}/state.safetensors is damaged (its hash differs). Delete {folder} to resume from the one before."
        )
    return read_tensors(folder / "state.safetensors"), state
