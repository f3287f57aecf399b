"""Checkpoints: safetensors and JSON only, hashed, written under a temporary name and renamed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt
from safetensors import safe_open
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import (
    delete_folder,
    partial_folder,
    reason_of,
    replace_folder,
    sha256,
    tensor_names,
    write_tensors,
    write_text,
)
from fewstep.core.finite import first_non_finite
from fewstep.core.json_files import read_json_object
from fewstep.distill import sharding
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.roles import Role

NAME = re.compile(r"step-\d+")
ADAMW = {"exp_avg", "exp_avg_sq"}  # the moments of a parameter, of which it cannot use one alone


class Best(BaseModel):
    """The best validation of a stage."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    value: float
    step: NonNegativeInt


class Counters(BaseModel):
    """What a checkpoint's state says about training itself, besides tensors."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    stage: NonNegativeInt
    step: NonNegativeInt
    seconds: NonNegativeFloat
    evaluations: NonNegativeInt
    best: Best | None

    @staticmethod
    def of(state: Mapping[str, Any]) -> Counters:
        """Those of a state. Raises ``KeyError`` if one is missing, ``ValueError`` if it is no such number."""
        counters = {name: state[name] for name in Counters.model_fields}
        return Counters.model_validate(counters | {"best": counters["best"] or None})


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


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint, read when they are asked for. ``parts`` maps a file to the first rows of the tensors
    of which it has some rows."""

    def __init__(self, parts: Mapping[Path, Mapping[str, int]]) -> None:
        self._places: dict[str, list[tuple[int, Path]]] = {}
        for file, rows in parts.items():
            for name in tensor_names(file):
                self._places.setdefault(name, []).append((rows.get(name, 0), file))

    def __getitem__(self, name: str) -> Tensor:
        pieces = []
        for _, file in sorted(self._places[name]):
            with safe_open(file, framework="pt") as handle:
                pieces.append(handle.get_tensor(name))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> None:
        """Copies a tensor into ``target``; into a split one only the rows that this process holds. Raises ``KeyError``
        if there is no such tensor, ``ValueError`` if it has another shape."""
        if not sharding.is_sharded(target):
            value = self[name]
            _require_shape(name, list(value.shape), target)
            target.copy_(value)
            return
        _require_shape(name, self._shape(name), target)
        own = sharding.local(target)
        start, stop = sharding.first_row(target), sharding.first_row(target) + len(own)
        for first, file in sorted(self._places[name]):
            with safe_open(file, framework="pt") as handle:
                rows = handle.get_slice(name)
                low, high = max(start, first), min(stop, first + rows.get_shape()[0])
                if low < high:
                    own[low - start : high - start].copy_(rows[low - first : high - first])

    def _shape(self, name: str) -> list[int]:
        """The shape of a tensor that is put together from its pieces."""
        shapes = []
        for _, file in self._places[name]:
            with safe_open(file, framework="pt") as handle:
                shapes.append(handle.get_slice(name).get_shape())
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


def _require_shape(name: str, shape: list[int], target: Tensor) -> None:
    if shape != list(target.shape):
        raise ValueError(f"{name} is {shape} in the checkpoint, and {list(target.shape)} here")


def restore_role(name: str, role: Role, tensors: StoredTensors) -> None:
    """The inverse of ``role_tensors``, in place. Raises ``UserError`` if the tensors do not fit the role."""
    weights = role.module.state_dict()
    stored = {key.removeprefix(f"{name}/weights/") for key in tensors if key.startswith(f"{name}/weights/")}
    if differing := sorted(stored ^ weights.keys()):
        raise UserError(f"The checkpoint's {name!r} does not fit this run's network, which differs in {differing[0]}.")
    try:
        for key, value in weights.items():
            tensors.fill(f"{name}/weights/{key}", value)
        for key, value in role.average.items():
            tensors.fill(f"{name}/average/{key}", value)
    except ValueError as error:
        raise UserError(f"The checkpoint's {name!r} does not fit this run's network: {error}.") from error
    if role.optimizer is None:
        return
    role.updates = int(tensors[f"{name}/updates"])
    moments = sorted({key.split("/")[2] for key in tensors if key.startswith(f"{name}/optimizer/")})
    for key, parameter in role.module.named_parameters():
        present = {moment: f"{name}/optimizer/{moment}/{key}" for moment in moments}
        present = {moment: path for moment, path in present.items() if path in tensors}
        if present:
            if not ADAMW.isdisjoint(moments) and (missing := sorted(ADAMW - present.keys())):
                raise KeyError(f"{name}/optimizer/{missing[0]}/{key}")
            try:
                role.optimizer.state[parameter] = {
                    moment: _moment(moment, parameter, tensors, path, "qmap1" in present, role.skips)
                    for moment, path in present.items()
                }
            except ValueError as error:
                raise UserError(f"The checkpoint's {name!r} does not fit this run's optimizer: {error}.") from error


def _moment(moment: str, parameter: Tensor, tensors: StoredTensors, path: str, eight_bit: bool, fused: bool) -> Any:
    if moment == "step":  # a number in 8-bit AdamW; on the device in a fused one, else on the host
        count = tensors[path]
        if count.numel() != 1:
            raise ValueError(f"{path} is {list(count.shape)} in the checkpoint, and one number here")
        return count.item() if eight_bit else count.to(parameter.device if fused else "cpu")
    if sharding.is_sharded(parameter):
        value = torch.zeros_like(parameter)
        tensors.fill(path, value)
        return value
    value = tensors[path]
    if not eight_bit:  # which has tables and scales too
        _require_shape(path, list(value.shape), parameter)
    if moment in ADAMW and value.dtype != parameter.dtype:
        raise ValueError(f"{path} is {value.dtype} in the checkpoint, and {parameter.dtype} here")
    return value.to(parameter.device)


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int,
    world: World = SINGLE_PROCESS,
) -> Path:  # fmt: skip
    """Writes ``folder/step-XXXXXXX`` completely or not at all, then deletes all but the last ``keep``. All processes
    call it; each writes the rows that it holds of split tensors, and the first one all else.

    Raises ``UserError`` if it cannot be written, and if a number is not finite: then the ones before stay.
    """
    final = folder / f"step-{step:07d}"
    partial = partial_folder(final)
    own = {name: sharding.local(x) for name, x in tensors.items() if world.rank == 0 or sharding.is_sharded(x)}
    with world.together():
        if (bad := first_non_finite(own)) is not None:
            raise UserError(
                f"No checkpoint of step {step} was written: {bad} has numbers that are not finite. Resume from the "
                "last one with a lower learning rate or a lower guidance."
            )
    try:
        world.once(lambda: _new_folder(partial))
        rows = {name: sharding.first_row(x) for name, x in tensors.items() if sharding.is_sharded(x)}
        number = f"-{world.rank + 1:05d}-of-{world.size:05d}" if rows else ""
        part: dict[str, Any] | None = None
        with world.together():
            if own:
                file = partial / f"state{number}.safetensors"
                write_tensors(own, file)
                part = {"file": file.name, "sha256": sha256(file), "rows": rows}
        parts = [each for each in world.gather(part) if each is not None]
        world.once(lambda: _complete(partial, final, {**state, "step": step, "parts": parts}))
    except (OSError, UserError) as error:
        cause = reason_of(error.__cause__ if isinstance(error.__cause__, OSError) else error).rstrip(".")
        raise UserError(f"Cannot write the checkpoint {final}: {cause}. Mend that, then use --resume.") from error
    finally:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    if world.rank == 0:
        delete_old(folder, step, keep)
    return final


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Deletes the checkpoints before ``step`` but for the last ``keep`` up to it. Those after it, which are damaged
    where a run at this step continues, do not count."""
    for old in checkpoints(folder, step)[:-keep]:
        delete_folder(old)


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(partial: Path, final: Path, record: dict[str, Any]) -> None:
    record["record_sha256"] = _hash(record)
    write_text(json.dumps(record, indent=2) + "\n", partial / "state.json")
    replace_folder(partial, final)


def checkpoints(folder: Path, before: int | None = None) -> list[Path]:
    """The checkpoints, oldest first; with ``before``, those at or before that step."""
    found = sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)
    return [path for path in found if before is None or step_of(path) <= before]


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def read_checkpoint(folder: Path, *, verify: bool = True) -> tuple[StoredTensors, dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises ``UserError`` if it is incomplete or (with ``verify``) a hash
    of its tensors does not match."""
    try:
        state = read_json_object(folder / "state.json")
        if state.get("record_sha256") != _hash(state):
            raise UserError(f"{folder} is damaged: the hash of state.json differs.")
        if NAME.fullmatch(folder.name) and state.get("step") != step_of(folder):
            raise UserError(f"{folder} is damaged: its state.json is of step {state.get('step')}.")
        parts = _parts(folder / "state.json", state)
        for file, (digest, _) in parts.items() if verify else ():
            if sha256(file) != digest:
                raise UserError(f"{folder} is damaged: the hash of {file.name} differs.")
    except OSError as error:
        raise UserError(f"{folder} is not a complete checkpoint ({error}).") from error
    return StoredTensors({file: rows for file, (_, rows) in parts.items()}), state


def _parts(record: Path, state: Mapping[str, Any]) -> dict[Path, tuple[str, dict[str, int]]]:
    """The files of a checkpoint, each with its hash and the first rows of split tensors. Raises ``UserError`` if the
    ``record`` does not list them so."""
    try:
        return {
            record.with_name(part["file"]): (
                str(part["sha256"]),
                {name: int(row) for name, row in part["rows"].items()},
            )
            for part in state["parts"]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else f"parts: {error}"
        raise UserError(f"{record} does not list the files of a checkpoint: {reason}. Restore it.") from error


def read_newest(
    folder: Path, before: int | None = None, world: World = SINGLE_PROCESS
) -> tuple[Path, StoredTensors, dict[str, Any], list[str]]:
    """The newest checkpoint in ``folder`` that is not damaged, at or before the step ``before``: its path, tensors and
    state, and what is wrong with newer ones. The first process chooses it.

    Raises ``UserError`` if there is none.
    """
    path, damaged = world.once(lambda: _newest(folder, before))
    return path, *read_checkpoint(path, verify=False), damaged


def _newest(folder: Path, before: int | None) -> tuple[Path, list[str]]:
    damaged: list[str] = []
    for path in reversed(checkpoints(folder, before)):
        try:
            read_checkpoint(path)
            return path, damaged
        except UserError as error:
            damaged.append(str(error))
    raise UserError(" ".join([*damaged, "No other checkpoint is left: restore one, or train in another folder."]))


def _hash(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a state but for the field that holds it."""
    content = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
