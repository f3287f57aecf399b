"""Models on disk: a folder with ``config.json`` and ``model.safetensors``, or the name of an embedded model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError, nearest
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.prediction import Kind
from fewstep.models.schedules import schedule_from_dict
from fewstep.models.unet import UNet

BACKBONES: dict[str, type[nn.Module]] = {"unet": UNet}
PRETRAINED = Path(__file__).parent / "pretrained"


class FewStep(BaseModel):
    """How a distilled student is sampled: its times (from 1 downwards) and the rule between them.

    ``shift`` is that of the times, for grids of another number of steps. ``counts``: the numbers of steps that it
    serves, told to it as ``condition["steps"]``; none: it is not told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    times: tuple[float, ...]
    rule: Literal["renoise", "deterministic"]
    counts: tuple[int, ...] = ()
    shift: float = 1.0


class ModelConfig(BaseModel):
    """``config.json``: everything needed to rebuild a native model and to draw samples of the right shape.

    With ``boundaries`` it is several backbones, each for the times down to its boundary (``denoiser.Routed``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fewstep-model"] = "fewstep-model"
    backbone: dict[str, Any]
    noise_schedule: dict[str, Any] = {"name": "rectified_flow"}
    prediction: Kind = "velocity"
    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    classes: int = Field(0, ge=0)
    few_step: FewStep | None = None
    boundaries: tuple[float, ...] | None = None

    def build(self, taps: tuple[str, ...] = ()) -> Denoiser:
        """A freshly initialised denoiser. Raises ``UserError`` on an unknown backbone, setting or tap."""
        settings = dict(self.backbone)
        name = str(settings.pop("name", ""))
        if name not in BACKBONES:
            raise UserError(f"Unknown backbone {name!r}{nearest(name, BACKBONES)}.")
        try:
            experts = [
                BACKBONES[name](channels=self.shape[0], classes=self.classes, **settings)
                for _ in self.boundaries or [0.0]
            ]
            backbone = Routed(experts, self.boundaries) if self.boundaries else experts[0]
            schedule = schedule_from_dict(self.noise_schedule)
            return Denoiser(backbone, schedule, self.prediction, taps).eval()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"The model's settings do not build a network: {error}.") from error


class Model(BaseModel):
    """A denoiser with its config and where it came from."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)
    denoiser: Denoiser
    config: ModelConfig
    path: Path

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def embedded_models() -> list[str]:
    return sorted(config.parent.name for config in PRETRAINED.glob("*/config.json"))


def load_model(source: str | Path, taps: tuple[str, ...] = ()) -> Model:
    """Loads a model folder or an embedded model by name, in eval mode on the CPU.

    Raises ``UserError`` if there is none, if a file is damaged, or if the weights do not fit the config.
    """
    folder = Path(source)
    if not folder.exists() and str(source) in embedded_models():
        folder = PRETRAINED / str(source)
    config_file = folder / "config.json"
    if (folder / "model_index.json").exists():
        raise UserError(f"{folder} is a diffusers pipeline; this version loads fewstep model folders only.")
    if not config_file.exists():
        hint = nearest(str(source), embedded_models())
        raise UserError(f"No model at {str(source)!r}: neither a folder with config.json nor an embedded model{hint}.")
    try:
        config = ModelConfig.model_validate_json(config_file.read_text(encoding="utf-8"))
        denoiser = config.build(taps)
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{config_file} is not a fewstep model config: {_first(error)}.") from error
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    load_weights(denoiser.backbone, folder / "model.safetensors")
    return Model(denoiser=denoiser, config=config, path=folder)


def load_weights(module: nn.Module, file: Path) -> None:
    """Fills ``module`` from a safetensors file. Raises ``UserError`` on damage, missing names or wrong shapes."""
    tensors = read_tensors(file)
    own = module.state_dict()
    missing, foreign = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or foreign:
        raise UserError(
            f"{file} does not belong to this network: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(foreign)} unknown (first: {foreign[:1]}). Is it the file of another model?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{file}: {name} has shape {list(tensor.shape)}, the network needs {list(own[name].shape)}. "
                "Does config.json stand beside the right weights?"
            )
    module.load_state_dict(tensors)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``UserError`` if it is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file} does not exist.")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}). Restore it or make it again.") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    with safe_open(file, framework="pt") as handle:
        return handle.metadata() or {}


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A path beside ``file`` that takes its name at the end: a full disk or a kill never leaves half a file there.

    Raises ``UserError`` when the place cannot be written.
    """
    aside = file.with_name(file.name + ".part")
    try:
        yield aside
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"Cannot write {file}: {error}. Free some space or choose another folder.") from error


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. Raises ``UserError`` when the place cannot be written."""
    with _replacing(file) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)


def write_text(text: str, file: Path) -> None:
    """Writes a text file, whole or not at all. Raises ``UserError`` when the place cannot be written."""
    with _replacing(file) as aside:
        aside.write_text(text, encoding="utf-8")


def save_model(denoiser: Denoiser, config: ModelConfig, folder: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``. Raises ``UserError`` when the folder cannot be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {error}.") from error
    write_tensors(denoiser.backbone.state_dict(), folder / "model.safetensors")
    write_text(json.dumps(config.model_dump(mode="json", exclude_none=True), indent=2) + "\n", folder / "config.json")


def sha256(file: Path) -> str:
    """Hash of a file's bytes, as hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _first(error: ValidationError | UnicodeDecodeError | OSError) -> str:
    if not isinstance(error, ValidationError):
        return "it is not text" if isinstance(error, UnicodeDecodeError) else str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
