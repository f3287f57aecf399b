"""Models on disk: a folder with ``config.json`` and ``model.safetensors``, or the name of an embedded model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError, nearest
from fewstep.models.adapters import AdapterView, share
from fewstep.models.denoiser import Denoiser, Routed, routed, spelt_out
from fewstep.models.hub.family import HubBackbone
from fewstep.models.prediction import Kind
from fewstep.models.schedules import schedule_from_dict, schedule_to_dict
from fewstep.models.unet import UNet

if TYPE_CHECKING:
    from fewstep.models.hub.folder import PipelineFolder

Size = tuple[int, int, int]
BACKBONES: dict[str, type[UNet]] = {"unet": UNet}
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


class Lora(BaseModel):
    """An adapter's settings, as PEFT takes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: PositiveInt
    alpha: float = Field(gt=0)
    targets: tuple[str, ...] = Field(min_length=1)


class ModelConfig(BaseModel):
    """``config.json``: everything needed to rebuild a model and to draw samples of the right shape.

    With ``boundaries`` it is several backbones, each for the times down to its boundary (``denoiser.Routed``). With
    ``base``, another model's folder or name, the network is that model's: with other weights or, with ``lora``, its
    own under an adapter. ``shift`` is that of a teacher's time grid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fewstep-model"] = "fewstep-model"
    backbone: dict[str, Any]
    noise_schedule: dict[str, Any] = {"name": "rectified_flow"}
    prediction: Kind = "velocity"
    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    classes: int = Field(0, ge=0)
    shift: float = Field(1.0, gt=0)
    base: str | None = None
    lora: Lora | None = None
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
            return Denoiser(backbone, schedule, self.prediction, spelt_out(taps, BACKBONES[name].TAPS)).eval()
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

    def labels(self, n: int) -> Tensor:
        """``0, 1, ..., classes - 1, 0, ...``: every class equally often, as in a reference. Raises ``UserError`` on a
        model that takes prompts."""
        if not self.config.classes:
            raise UserError("This is for class-conditional models; this one takes prompts.")
        return torch.arange(n) % self.config.classes


def embedded_models() -> list[str]:
    """The names of the models that ship with the package: of fewstep, and diffusers pipelines."""
    return sorted(file.parent.name for kind in ("config", "model_index") for file in PRETRAINED.glob(f"*/{kind}.json"))


def load_model(
    source: str | Path, taps: tuple[str, ...] = (), size: Size | None = None, dtype: torch.dtype = torch.float32
) -> Model:
    """Loads a model folder, an embedded model by name, or a diffusers pipeline by folder or hub id, in eval mode on the
    CPU. ``size`` (height, width, frames in pixels) and ``dtype`` of the weights are for pipelines.

    Raises ``UserError`` if there is none, if a file is damaged, or if the weights do not fit the config.
    """
    folder = place_of(source)
    if is_pipeline(source):
        return _load_pipeline(folder, taps, size, dtype)
    if not (folder / "config.json").exists():
        hint = nearest(str(source), embedded_models())
        raise UserError(
            f"No model at {str(source)!r}: neither a folder with config.json (a model of fewstep) or model_index.json "
            f"(a diffusers pipeline) nor an embedded model{hint}."
        )
    config = _read_config(folder)
    try:
        stored = tensor_names(folder / "model.safetensors") if config.base else set()
        denoiser = _network(config, taps, dtype, stored)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    load_weights(denoiser.backbone, folder / "model.safetensors")
    return Model(denoiser=denoiser, config=config, path=folder)


def is_hub_id(source: str) -> bool:
    """Whether a string that is no path can be a pipeline's id on the hub: ``owner/name``, no folder ``owner`` here."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not Path(source).exists() and not Path(parts[0]).exists()


def pipeline_of(model: Model) -> PipelineFolder:
    """The diffusers pipeline whose text encoders and VAE belong to a model: its own, or that of its base's base.

    Raises ``UserError`` for a native model, which has none.
    """
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra

    config = model.config
    while config.base is not None:
        if is_pipeline(config.base):
            return PipelineFolder.open(place_of(config.base))
        config = _read_config(place_of(config.base))
    raise UserError("This model takes class labels, not prompts.")


def place_of(source: str | Path) -> Path:
    """A folder, or that of an embedded model by name."""
    return PRETRAINED / str(source) if not Path(source).exists() and str(source) in embedded_models() else Path(source)


def is_pipeline(source: str | Path) -> bool:
    """Whether a model's folder or name is that of a diffusers pipeline, embedded, on disk or on the hub."""
    return (place_of(source) / "model_index.json").is_file() or is_hub_id(str(source))


def _read_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    try:
        return ModelConfig.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not a fewstep model config: {_first(error)}.") from error


def _load_pipeline(source: Path, taps: tuple[str, ...], size: Size | None, dtype: torch.dtype) -> Model:
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra

    folder = PipelineFolder.open(source)
    if source.parent == PRETRAINED:
        base = source.name
    else:
        base = str(source) if is_hub_id(str(source)) else str(folder.path.resolve())
    config = ModelConfig(
        backbone={"name": "diffusers"},
        noise_schedule=schedule_to_dict(folder.noising.schedule),
        prediction=folder.noising.kind,
        shape=folder.family.shape(*(size or folder.family.default_size)),
        shift=folder.noising.shift,
        base=base,
    )
    return Model(denoiser=folder.denoiser(dtype, taps), config=config, path=folder.path)


def _network(config: ModelConfig, taps: tuple[str, ...], dtype: torch.dtype, stored: set[str]) -> Denoiser:
    """The network that the weights of a model folder, named in ``stored``, belong to."""
    if config.base is None:
        return config.build(taps)
    denoiser = load_model(config.base, taps, dtype=dtype).denoiser
    if lora := config.lora:
        share_network(denoiser, lora.rank, lora.alpha, lora.targets)
    if config.boundaries:  # an expert without weights of its own is the base
        own = [any(name.startswith(f"experts.{k}.") for name in stored) for k in range(len(config.boundaries))]
        experts = [copy.deepcopy(denoiser) if its_own else denoiser for its_own in own]
        return routed(experts, config.boundaries).eval()
    return (copy.deepcopy(denoiser) if lora else denoiser).eval()


def share_network(denoiser: Denoiser, rank: int, alpha: float | None, targets: Sequence[str] | None) -> Lora:
    """Freezes the network of ``denoiser``, which becomes the view of it without a set; copies of it are adapters.

    A network that is itself under an adapter is merged first. Returns the settings with their defaults filled in: alpha
    is the rank, targets what is adapted in such a network. Raises ``UserError`` if that is not known.
    """
    network = denoiser.backbone
    if isinstance(network, AdapterView):
        network = network.merged()
    if targets is None and isinstance(network, HubBackbone):
        targets = network.family.targets
    elif targets is None and isinstance(network, UNet):
        targets = UNet.TARGETS
    elif targets is None:
        raise UserError(f"Which layers of a {type(network).__name__} should be adapted? Set adapters.targets.")
    lora = Lora(rank=rank, alpha=alpha or rank, targets=tuple(targets))
    denoiser.backbone = share(network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return lora


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


def tensor_names(file: Path) -> set[str]:
    """The names in a safetensors file. Raises ``UserError`` if it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}). Restore it or make it again.") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    with safe_open(file, framework="pt") as handle:
        return handle.metadata() or {}


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside ``file``, whose folder is made, that takes its name at the end: a full disk or a kill never leaves
    half a file there.

    Raises ``UserError`` when the place cannot be written.
    """
    aside = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink()
        raise _unwritable(file, error) from error


def reserve(file: str | Path) -> None:
    """Before long work whose result goes to ``file``: raises ``UserError`` if it could not be written there."""
    file = Path(file)
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file.")
    trial = file.with_name(f".{file.name}.try")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: Exception) -> UserError:
    return UserError(f"Cannot write {file}: {error}. Free some space or choose another folder.")


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. Raises ``UserError`` when the place cannot be written."""
    with replacing(file) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)


def write_text(text: str, file: Path) -> None:
    """Writes a text file, whole or not at all. Raises ``UserError`` when the place cannot be written."""
    with replacing(file) as aside:
        aside.write_text(text, encoding="utf-8")


def save_model(denoiser: Denoiser, config: ModelConfig, folder: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``. Raises ``UserError`` when the folder cannot be written."""
    folder = Path(folder)
    write_tensors(denoiser.backbone.state_dict(), folder / "model.safetensors")
    write_text(json.dumps(config.model_dump(mode="json", exclude_none=True), indent=2) + "\n", folder / "config.json")


def sha256(*files: Path) -> str:
    """Hash of the bytes of one file, or of several one after the other, as hex."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _first(error: ValidationError | UnicodeDecodeError | OSError) -> str:
    if not isinstance(error, ValidationError):
        return "it is not text" if isinstance(error, UnicodeDecodeError) else str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
