"""The configuration of a run: one typed YAML file. Unknown keys and wrong values are errors that name them."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from fewstep.core.errors import UserError, nearest
from fewstep.core.registry import Registry, is_dotted
from fewstep.distill import objectives
from fewstep.distill.data.batch import SOURCES
from fewstep.distill.stage import BaseConfig, ObjectiveConfig, RoleConfig
from fewstep.models.attention import Backend
from fewstep.models.model_config import ModelConfig

DATA_KINDS = ("labels", "idx", "folder", "tensors", "prompts")
RENAMED = {
    "taps": ("feature_layers",),
    "heads": ("feature_layers",),
    "whole": ("full_finetune",),
    "decay": ("lr_schedule",),
    "pull": ("match_on",),
    "times": ("renoise_times", "student_times"),
    "pictures": ("images",),
}  # old key: its new names
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class DataConfig(BaseConfig):
    """The data source. ``kind`` is one of

    ``labels``: uniform class labels, no data. ``idx``: a folder of idx files. ``folder``: images, one subfolder per
    class. ``tensors``: a safetensors file of labelled samples (``fewstep data ode-pairs``, ``fewstep data
    preferences``, or the real images of a reference). ``prompts``: a folder from ``fewstep data encode``, with or
    without images; without, ``sizes`` lists height, width and frames in pixels, and each batch has one of them (by
    default the run's ``size``). Any other name is your own source, created with ``options``.
    """

    kind: str = "labels"
    path: str | None = None
    split: Literal["train", "test"] = "train"
    sizes: tuple[tuple[int, int, int], ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind not in DATA_KINDS and self.kind not in SOURCES.names() and not is_dotted(self.kind):
            raise ValueError(f"unknown kind{nearest(self.kind, [*DATA_KINDS, *SOURCES.names()])}")
        if self.kind in DATA_KINDS and self.kind != "labels" and self.path is None:
            raise ValueError(f"kind {self.kind} needs a path")
        if self.sizes and self.kind != "prompts":
            raise ValueError(f"sizes are for kind prompts, not {self.kind}")
        if self.options and self.kind in DATA_KINDS:
            raise ValueError(f"options are for your own sources, not for kind {self.kind}")
        return self


class CheckpointConfig(BaseConfig):
    """A checkpoint is written every ``every`` steps, at the end and on Ctrl-C; the last ``keep`` stay."""

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)


class ValidationConfig(BaseConfig):
    """Every ``every`` steps (0: never) ``n`` samples of the averaged student are scored against the *training*-image
    statistics of ``reference``, and the best student so far is saved. They are generated with ``solver`` (``student``:
    the student's own few-step rule), ``steps`` and ``guidance``. A pipeline's student is not scored: it generates
    ``images`` for prompts spread over all."""

    every: int = Field(0, ge=0)
    n: int = Field(1000, ge=10)
    reference: str = "fashion"
    solver: str = "student"
    steps: int | None = Field(None, ge=1)
    guidance: float = 1.0
    images: int = Field(4, ge=1)


class HealthConfig(BaseConfig):
    """Every ``every`` steps (0: never) the averaged student generates ``seeds`` samples for each of ``conditions``
    conditions. They are compared with the teacher's: ``teacher_steps`` Heun steps with the objective's guidance."""

    every: int = Field(50, ge=0)
    conditions: int = Field(8, ge=1)
    seeds: int = Field(8, ge=2)
    teacher_steps: int = Field(16, ge=1)


class StageConfig(BaseConfig):
    """One stage: its steps, its objective, the roles that it trains, frozen copies (``freeze`` maps new name to role),
    and the maximum gradient norm ``clip``."""

    steps: int = Field(ge=1)
    objective: SerializeAsAny[ObjectiveConfig]
    roles: dict[str, RoleConfig]
    freeze: dict[str, str] = Field(default_factory=dict)
    clip: float | None = Field(1.0, gt=0)


class AdapterConfig(BaseConfig):
    """Trains roles as LoRA adapters on the teacher's frozen network instead of as copies of it. ``alpha`` defaults to
    the rank (a scale of 1, which every loader applies correctly), ``targets`` to the layers that the family adapts."""

    rank: int = Field(64, ge=1)
    alpha: float | None = Field(None, gt=0)
    targets: tuple[str, ...] | None = None


class Config(BaseConfig):
    """A run. Give either ``teacher`` (a folder, a bundled name, or a diffusers pipeline by folder or hub id) or
    ``model`` (a new network).

    For pipelines: ``size`` is height, width and frames in pixels; ``weights`` is the type of the teacher's weights and
    of its copies' (with adapters also ``int8`` or ``nf4`` for linear layers); ``gradient_checkpointing`` saves memory.
    ``offload`` keeps frozen copies in host memory between their evaluations.
    """

    out: str | None = None
    teacher: str | None = None
    size: tuple[int, int, int] | None = None
    weights: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    adapters: AdapterConfig | None = None
    attention: Backend = "sdpa"
    gradient_checkpointing: bool = False
    offload: bool = False
    model: ModelConfig | None = None
    data: DataConfig = DataConfig()
    batch: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: int = Field(10, ge=1)
    tensorboard: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    health: HealthConfig = HealthConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is not None and self.model is not None:
            raise ValueError("give either teacher (to distil) or model (to pretrain), not both")
        if self.data.kind == "prompts" and self.model is not None:
            raise ValueError("data.kind: prompts needs a teacher that is a diffusers pipeline")
        if self.weights in ("int8", "nf4") and self.adapters is None:
            raise ValueError(f"weights: {self.weights} cannot be trained; add adapters")
        if self.offload and self.adapters is not None:
            raise ValueError("offload is for copies: with adapters every evaluation needs the one shared network")
        return self

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)


class _BuiltinObjectives(Mapping[str, type[ObjectiveConfig]]):
    """The classes in ``distill/objectives`` by file name, imported on access."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(module.name for module in pkgutil.iter_modules(objectives.__path__)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> type[ObjectiveConfig]:
        if name not in list(self):
            raise KeyError(name)
        module = importlib.import_module(f"{objectives.__name__}.{name}")
        return next(
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, ObjectiveConfig) and value.__module__ == module.__name__
        )


OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry(
    "objective", _BuiltinObjectives, lambda value: isinstance(value, type) and issubclass(value, ObjectiveConfig),
    "a subclass of fewstep.distill.stage.ObjectiveConfig",
)  # fmt: skip


def find_config(path: str | Path) -> Path:
    """A config file, or one that the package contains (``configs/fashion/demo.yaml`` works in any folder).

    Raises ``UserError`` if there is neither.
    """
    given = Path(path)
    if given.is_file():
        return given
    inside = Path(*given.parts[1:]) if given.parts and given.parts[0] == "configs" else given
    packaged = CONFIGS / inside.with_suffix(".yaml")
    if packaged.is_file():
        return packaged
    known = sorted("configs/" + str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml"))
    raise UserError(f"No config file {str(path)!r}{nearest(str(path), known)}.")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with ``key=value`` overrides (dotted keys, list items by number).

    Raises ``UserError`` that names the file (or the command line), the key, the value and the nearest valid key.
    """
    return parse_config(*read_settings(path, overrides))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The contents of a YAML file with overrides applied; for messages, also its name and the overrides by key.

    Raises ``UserError`` if the file does not exist, is not valid YAML, or an override does not fit.
    """
    file = find_config(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} must contain a mapping of settings, not a {type(raw).__name__}.")
    return raw, str(file), {_override(raw, text): text for text in overrides}


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
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def _override(raw: dict[str, Any], text: str) -> str:
    """Applies one ``key=value`` in place and returns its key."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not an override; write key=value, for example seed=1 or stages.0.steps=200.")
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts[:-1]):
        try:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        except (ValueError, IndexError) as error:
            raise UserError(
                f"Override {text!r}: {'.'.join(parts[:depth])} is a list of {len(node)}; give the number of an item."
            ) from error
        if not isinstance(node, dict | list):
            raise UserError(f"Override {text!r}: {'.'.join(parts[: depth + 1])} is a single value without keys.")
    try:
        parsed = yaml.safe_load(value)
        node[int(parts[-1]) if isinstance(node, list) else parts[-1]] = parsed
    except (yaml.YAMLError, ValueError, IndexError) as error:
        raise UserError(f"Override {text!r} cannot be applied: {' '.join(str(error).split())}.") from error
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
            renamed = next((new for new in RENAMED.get(last, ()) if new in known), None)
            hint = f"; it is now called {renamed!r}" if renamed else nearest(last, known)
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
