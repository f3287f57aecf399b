"""Reading and writing configs: YAML files, ``key=value`` overrides, and messages that name file, key and value."""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Field, StrictInt, ValidationError

from fewstep.core.errors import UserError, kind_of, nearest
from fewstep.core.files import reading
from fewstep.core.yaml_files import dump_yaml, parse_yaml, read_yaml
from fewstep.distill.config import Config
from fewstep.distill.objectives import OBJECTIVES
from fewstep.distill.stage import ObjectiveConfig

RENAMED = {
    "taps": ("feature_layers",),
    "heads": ("feature_layers",),
    "whole": ("full_finetune",),
    "decay": ("lr_schedule",),
    "pull": ("match_on",),
    "times": ("renoise_times", "student_times"),
    "t_range": ("renoise_times", "dm_times", "student_times"),
    "inner": ("rollout_times",),
    "time": ("student_times.kind",),
    "time_std": ("student_times.std",),
    "pictures": ("images",),
    "tensorboard": ("trackers: [tensorboard]",),
}  # old key: its new names
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find_config(path: str | Path) -> Path:
    """A config file, or one that the package contains (``configs/fashion/demo.yaml`` works in any folder).

    Raises ``UserError`` if there is neither.
    """
    given = Path(path)
    if given.is_file():
        return given
    inside = Path(*given.parts[1:]) if given.parts and given.parts[0] == "configs" else given
    packaged = CONFIGS / inside if inside.suffix else (CONFIGS / inside).with_suffix(".yaml")
    if packaged.is_file():
        return packaged
    if (given / "config.yaml").is_file():
        raise UserError(
            f"{path} is a run, not a config. Continue it with fewstep train --resume {shlex.quote(str(path))}."
        )
    known = {str(file) for file in given.parent.glob("*.y*ml")}
    known |= {"configs/" + str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml")}
    raise UserError(f"No config file {str(path)!r}{nearest(str(path), sorted(known))}.")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with ``key=value`` overrides (dotted keys, list items by number).

    Raises ``UserError`` that names the file (or the command line), the key, the value and the nearest valid key.
    """
    raw, file, overridden = read_settings(path, overrides)
    if "methods" in raw and "stages" not in raw:
        raise UserError(f"{file} compares several methods: use fewstep bench objectives {path}.")
    return parse_config(raw, file, overridden)


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The contents of a YAML file with overrides applied; for messages, also its name and the overrides by key.

    Raises ``UserError`` if the file does not exist, is not valid YAML, or an override does not fit.
    """
    file = find_config(path)
    raw = read_yaml(file)
    if not isinstance(raw, dict):
        found = "it is empty" if raw is None else f"it contains {kind_of(raw)}"
        raise UserError(f"{file} must contain a mapping of settings, key: value; {found}.")
    return raw, str(file), {_override(raw, text): text for text in overrides}


class _WrittenData(BaseModel):
    kind: str | None = None
    path: str | None = None


class _Written(BaseModel):
    """The types of the settings that are used as a run's config has them, without the modules that it names."""

    teacher: str | None = None
    size: Annotated[list[StrictInt], Field(min_length=3, max_length=3)] | None = None
    data: _WrittenData | None = None
    stages: list[dict[str, Any]] | None = None


def written_settings(file: Path) -> dict[str, Any]:
    """The settings in a run's config as written. Raises ``UserError`` if those that are used so have a wrong type: the
    folder may come from somebody else."""
    settings = read_settings(file)[0]
    with reading(file, "config of a run", "Restore it."):
        _Written.model_validate(settings)
    return settings


def parse_config(raw: dict[str, Any], file: str, overridden: Mapping[str, str] | None = None) -> Config:
    """Validates raw settings; ``file`` and ``overridden`` (dotted key to ``key=value``) are for messages only.

    Raises ``UserError`` that lists all problems.
    """
    overridden = overridden or {}
    raw = dict(raw)
    problems: list[str] = []
    stages = raw.get("stages")
    if isinstance(stages, list):
        raw["stages"] = [
            _with_objective(stage, f"stages.{i}.objective", file, overridden, problems)
            if isinstance(stage, dict)
            else stage
            for i, stage in enumerate(stages)
        ]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += describe(error, Config, "", file, overridden)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _with_objective(
    stage: dict[str, Any], where: str, file: str, overridden: Mapping[str, str], problems: list[str]
) -> dict[str, Any]:
    """The stage with its objective's settings validated by the objective's own class."""
    settings = stage.get("objective")
    if isinstance(settings, str):
        settings = {"name": settings}
    if isinstance(settings, dict) and not isinstance(settings.get("name"), str):
        problems.append(f"{file}: {where}.name: give the name of an objective{nearest('', OBJECTIVES.names())}.")
        return {**stage, "objective": ObjectiveConfig(name="")}
    if not isinstance(settings, dict):
        return stage
    try:
        cls = OBJECTIVES.resolve(settings["name"])
    except UserError as error:
        problems.append(f"{file}: {where}.name: {error}")
        return {**stage, "objective": ObjectiveConfig(name=settings["name"])}
    try:
        return {**stage, "objective": cls.model_validate(settings)}
    except ValidationError as error:
        problems.extend(describe(error, cls, where, file, overridden))
        return {**stage, "objective": ObjectiveConfig(name=settings["name"])}


def dump_config(config: Config) -> str:
    """YAML with all defaults; ``load_config`` returns an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def _override(raw: dict[str, Any], text: str) -> str:
    """Applies one ``key=value`` in place and returns its key."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not an override; write key=value, for example seed=1 or stages.0.steps=200.")
    parts, parsed = key.split("."), parse_yaml(value, f"The override {text!r}")
    node: Any = raw
    for depth, part in enumerate(parts, start=1):
        try:
            place: Any = int(part) if isinstance(node, list) else part
            if depth == len(parts):
                node[place] = parsed
                return key
            child = node[place] if isinstance(node, list) else node.get(part, {})
            node[place] = node = child
        except (ValueError, IndexError) as error:
            raise UserError(
                f"Override {text!r}: {'.'.join(parts[: depth - 1])} is a list of {len(node)}; give the number of an "
                "item."
            ) from error
        if not isinstance(node, dict | list):
            raise UserError(f"Override {text!r}: {'.'.join(parts[:depth])} is a single value without keys.")
    return key


def describe(
    error: ValidationError, root: type[BaseModel], prefix: str, file: str, overridden: Mapping[str, str]
) -> list[str]:
    """One line per problem with settings of ``root``: where it is, key, value, what is wrong, the nearest key."""
    lines = []
    places = [problem["loc"] for problem in error.errors()]
    for problem in error.errors():
        loc = problem["loc"]
        if problem["type"] == "too_short" and any(len(p) > len(loc) and p[: len(loc)] == loc for p in places):
            continue  # only because its items are invalid
        key = ".".join([*([prefix] if prefix else []), *map(str, loc)])
        origin = next((f"the override {t!r}" for k, t in overridden.items() if _same_branch(k, key)), file)
        if problem["type"] == "extra_forbidden":
            last, known = str(loc[-1]), _keys_beside(root, loc)
            renamed = next((new for new in RENAMED.get(last, ()) if re.split("[.:]", new)[0] in known), None)
            hint = f"; it is now called {renamed!r}" if renamed else nearest(last, known)
            if len(loc) == 1 and "stages" in known and last in _keys_beside(root, ("stages", 0, last)):
                hint = f"; it is a key of a stage, such as 'stages.0.{last}'"
            lines.append(f"{origin}: unknown key {key!r}{hint}.")
        elif problem["type"] == "missing":
            lines.append(f"{origin}: the key {key!r} is missing.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = "" if isinstance(problem["input"], dict | BaseModel) else f" = {problem['input']!r}"
            lines.append(f"{origin}: {key or 'the config'}{value}: {message[:1].lower()}{message[1:]}.")
    return lines


def _same_branch(a: str, b: str) -> bool:
    """Whether one dotted key equals the other or is below it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _keys_beside(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The valid keys beside the last part of ``loc``."""
    kind: Any = root
    for part in loc[:-1]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:
            kind = get_args(kind)[-1 if get_origin(kind) is dict else 0]
        options = [arg for arg in get_args(kind) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        if get_origin(kind) in (types.UnionType,) and options:
            kind = options[0]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
