"""Loading models: a folder with ``config.json`` and ``model.safetensors``, a bundled model, a diffusers pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import read_tensors, reading
from fewstep.core.paths import is_hub_id, nearest_folder
from fewstep.core.registry import Registry
from fewstep.models.adapters import AdapterView, share_network
from fewstep.models.denoiser import Denoiser, routed
from fewstep.models.model_config import ModelConfig, Size
from fewstep.models.schedules import schedule_from_dict, schedule_to_dict

if TYPE_CHECKING:
    from fewstep.models.hub.folder import PipelineFolder

BUNDLED = Path(__file__).parent / "bundled"
DTYPES = {None: torch.float32, "bfloat16": torch.bfloat16}  # of a model's config


class Model(BaseModel):
    """A denoiser with its config and, if it was loaded from one, its folder."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)
    denoiser: Denoiser
    config: ModelConfig
    path: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        backbone = self.denoiser.backbone
        network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
        tensor = next(chain(network.parameters(), network.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def labels(self, n: int) -> Tensor:
        """``0, 1, ..., classes - 1, 0, ...`` [n]: all classes equally often; zeros, which have no meaning, for an
        unconditional model. Raises ``UserError`` on a model that takes prompts."""
        if self.config.takes_prompts:
            raise UserError("This needs class labels or an unconditional model; this one takes prompts: give captions.")
        return torch.arange(n) % max(1, self.config.classes)


def _is_teacher(value: Any) -> bool:
    """A model, or a function annotated to return one, so that a name in a saved model calls nothing else."""
    returned = inspect.get_annotations(value).get("return") if callable(value) else None
    return isinstance(value, Model) or returned in (Model, "Model", "fewstep.Model")


TEACHERS: Registry[Model | Callable[[], Model]] = Registry(
    "teacher", dict, _is_teacher, "a fewstep.Model or a function annotated to return one (def f() -> Model)"
)


def bundled_models() -> list[str]:
    """The names of the models that ship with the package, in fewstep's format or as diffusers pipelines."""
    return sorted(file.parent.name for kind in ("config", "model_index") for file in BUNDLED.glob(f"*/{kind}.json"))


def load_model(
    source: str | Path, feature_layers: tuple[str, ...] = (), size: Size | None = None,
    dtype: torch.dtype | None = None, *, from_file: bool = False,
) -> Model:  # fmt: skip
    """Loads a model folder, a bundled model by name, a diffusers pipeline by folder or hub id, or the user's own model
    by registered or dotted name, in eval mode on the CPU.

    ``size`` (height, width, frames in pixels) and the weights' ``dtype`` apply to pipelines and to models based on one;
    by default the weights are bfloat16 if they are stored so, else float32, and those under an adapter have the type
    with which it was trained. Weights of their stored type are mapped into memory: they are read when they are used.
    ``from_file``: ``source`` was read from a saved model and must not cause an import. Raises ``UserError`` if the
    model does not exist, a file is damaged, or the weights do not match the config.
    """
    if str(source) in TEACHERS:
        return _of_size(_own_model(str(source), feature_layers, from_file), size)
    folder = resolve_path(source)
    if is_pipeline(source):
        return _load_pipeline(folder, feature_layers, size, dtype)
    if (folder / "fewstep.json").is_file():
        return _load_export(folder, feature_layers, size, dtype)
    if not (folder / "config.json").exists():
        if (folder / "config.yaml").is_file():
            raise UserError(f"The run {folder} has no student yet: finish it by fewstep train --resume {folder}")
        if "/" in str(source) and not folder.exists():
            raise UserError(f"No model at {str(source)!r}: there is no such folder{nearest_folder(folder)}.")
        neither = "neither a folder with config.json (a fewstep model) or model_index.json (a diffusers pipeline)"
        known = nearest(str(source), bundled_models())
        raise UserError(f"No model at {str(source)!r}: {neither} nor a bundled model{known}.")
    config, weights = read_config(folder), folder / "model.safetensors"
    return model_of(config, lambda: read_tensors(weights), weights, feature_layers, size, dtype)


def model_of(
    config: ModelConfig, read: Callable[[], dict[str, Tensor]], weights: Path, feature_layers: tuple[str, ...] = (),
    size: Size | None = None, dtype: torch.dtype | None = None,
) -> Model:  # fmt: skip
    """The model of a config with the weights that ``read`` returns, from the file or folder ``weights``. Raises as
    ``load_model`` does."""
    try:
        denoiser = _network(config, feature_layers, dtype, set(read()) if config.boundaries else set())
    except UserError as error:
        raise UserError(f"{weights.with_name('config.json')}: {error}") from error
    if config.base is None or config.lora is not None:
        denoiser.backbone.load_state_dict(_fitting(denoiser.backbone, read(), weights))
    else:
        _replace_weights(denoiser.backbone, read(), weights, keep_types=dtype is None)
    denoiser.precision = DTYPES[config.precision]
    return _of_size(Model(denoiser=denoiser, config=config, path=weights.parent), size)


def _of_size(model: Model, size: Size | None) -> Model:
    """The model. Raises ``UserError`` if its own shape is not that of ``size``, which only a pipeline can follow."""
    if size is not None:
        bases = bases_of(model.config)
        of_pipeline = bases and is_pipeline(bases[-1])
        shape = pipeline_of(model).family.shape(*size) if of_pipeline else None
        if shape is None or tuple(shape) != tuple(model.config.shape):
            raise UserError(
                f"{model.path or 'This model'} always has the shape {list(model.config.shape)}, so leave size out; "
                "only a diffusers pipeline is loaded at any size."
            )
    return model


def _own_model(name: str, feature_layers: tuple[str, ...], from_file: bool) -> Model:
    found = TEACHERS.resolve(name, from_file=from_file)
    model = copy.deepcopy(found) if isinstance(found, Model) else found()  # never changes the user's object
    if not isinstance(model, Model):
        raise UserError(f"The teacher {name!r} returns a {type(model).__name__}, not a fewstep.Model.")
    model.denoiser.eval().record_features(feature_layers)
    return model


def pipeline_of(model: Model) -> PipelineFolder:
    """The diffusers pipeline that supplies a model's text encoders and VAE: that of its base, or of its base's base.

    Raises ``UserError`` for a native model, which has none.
    """
    if (folder := pipeline_of_config(model.config)) is not None:
        return folder
    if model.config.unconditional:
        raise UserError("This model is unconditional: it takes no prompts.")
    if model.config.vocabulary is not None:
        raise UserError("This needs a diffusers pipeline, and this model has none: it has words of its own.")
    raise UserError("This model takes class labels, not prompts.")


def pipeline_of_config(config: ModelConfig) -> PipelineFolder | None:
    """The pipeline on which a model is based; None without one."""
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra

    bases = bases_of(config)
    return PipelineFolder.open(resolve_path(bases[-1])) if bases and is_pipeline(bases[-1]) else None


def bases_of(config: ModelConfig) -> list[str]:
    """The base of a model, the base of that one, and so on. Raises ``UserError`` if one of them is its own base."""
    bases: list[str] = []
    while config.base is not None:
        if config.base in bases:
            raise UserError(f"The base {config.base!r} of this model is based on itself.")
        bases.append(config.base)
        folder = resolve_path(config.base)
        if config.base in TEACHERS or is_pipeline(config.base) or not (folder / "config.json").is_file():
            break
        config = read_config(folder)
    return bases


def resolve_path(source: str | Path) -> Path:
    """The path of a model folder, of a bundled model by name, or of the student in a run folder."""
    if not Path(source).exists() and str(source) in bundled_models():
        return BUNDLED / str(source)
    student = Path(source) / "student"
    of_run = (Path(source) / "config.yaml").is_file() and (student / "config.json").is_file()
    return student if of_run else Path(source)


def is_pipeline(source: str | Path) -> bool:
    """Whether a model's folder or name is a diffusers pipeline: bundled, on disk or on the hub."""
    return (resolve_path(source) / "model_index.json").is_file() or is_hub_id(str(source))


def read_config(folder: Path) -> ModelConfig:
    """``config.json`` of a model folder. Raises ``UserError`` if it is missing or damaged."""
    file = folder / "config.json"
    with reading(file, "config of a fewstep model"):
        return ModelConfig.model_validate_json(file.read_bytes())


def _load_export(path: Path, feature_layers: tuple[str, ...], size: Size | None, dtype: torch.dtype | None) -> Model:
    """The denoiser of an exported student (``merged``) in the pipeline that it was trained on."""
    from fewstep.models.hub.manifest import read_manifest  # needs the extra

    manifest = read_manifest(path)
    assert manifest is not None
    if manifest.form != "merged":
        raise UserError(f"{path} is an exported adapter for {manifest.base}: load it as its README describes.")
    if not is_pipeline(manifest.base):
        raise UserError(
            f"{path} is a denoiser without its pipeline, {manifest.base!r}, which was not found. Set base in "
            f"{path / 'fewstep.json'} to the folder of that pipeline."
        )
    return _load_pipeline(resolve_path(manifest.base), feature_layers, size, dtype, path)


def _load_pipeline(
    source: Path, feature_layers: tuple[str, ...], size: Size | None, dtype: torch.dtype | None,
    merged: Path | None = None,
) -> Model:  # fmt: skip
    """A pipeline, or the student in an exported one; ``merged``: the folder of another denoiser for it."""
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra
    from fewstep.models.hub.manifest import read_manifest

    folder = PipelineFolder.open(source)
    manifest = read_manifest(merged or folder.path)
    few_step, boundaries = (manifest.few_step, manifest.boundaries) if manifest else (None, folder.boundaries)
    shape = folder.family.shape(*(size or folder.family.default_size)) if size or not manifest else manifest.shape
    if source.parent == BUNDLED:
        base = source.name
    else:
        base = str(source) if is_hub_id(str(source)) else str(folder.path.resolve())
    networks = manifest.network_folders(merged or folder.path, folder.family) if manifest else [None]
    backbones = tuple(_backbone(folder, weights) for weights in networks)
    config = ModelConfig(
        backbone=backbones[0],
        expert_backbones=backbones if any(other != backbones[0] for other in backbones) else None,
        noise_schedule=schedule_to_dict(folder.noise_process.schedule),
        prediction=folder.noise_process.kind,
        shape=shape,
        shift=few_step.shift if few_step else folder.noise_process.shift,
        base=base,
        few_step=few_step,
        boundaries=boundaries or None,
    )
    experts = [folder.denoiser(dtype, feature_layers, weights) for weights in networks]
    denoiser = routed(experts, boundaries).eval() if len(experts) > 1 else experts[0]
    return Model(denoiser=denoiser, config=config, path=merged or folder.path)


def _backbone(folder: PipelineFolder, weights: Path | None) -> dict[str, Any]:
    """The settings of the network in ``weights``, if they are not those of the pipeline's own."""
    own = folder.path / folder.family.part
    if weights is None or weights == own or folder.network_settings(weights) == folder.network_settings(own):
        return {"name": "diffusers"}
    return {"name": "diffusers", "network": folder.network_settings(weights)}


def base_sha256(base: str) -> str | None:
    """SHA-256 of the weights of a model that serves as a base; None for the user's own, which has no files."""
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra
    from fewstep.models.hub.weights import weights_sha256

    if base in TEACHERS:
        return None
    folder = resolve_path(base)
    if is_pipeline(base):
        return PipelineFolder.open(folder).sha256
    return weights_sha256([folder / "model.safetensors"])


def base_dtype(config: ModelConfig) -> torch.dtype | None:
    """The type by default of the pipeline on which a model is based; None without one."""
    folder = pipeline_of_config(config)
    return None if folder is None else folder.dtype


def _network(
    config: ModelConfig, feature_layers: tuple[str, ...], dtype: torch.dtype | None, stored: set[str]
) -> Denoiser:
    """The network for the weights of a model folder; ``stored`` are the names of its tensors."""
    if config.base is None:
        return config.build(feature_layers, from_file=True)
    bases_of(config)  # refuses a circle
    if config.lora is not None:
        dtype = dtype or DTYPES[config.base_weights]

    def load_base() -> Denoiser:
        assert config.base is not None
        return load_model(config.base, feature_layers, dtype=dtype, from_file=True).denoiser

    def build(network: Mapping[str, Any]) -> Denoiser:
        folder = pipeline_of_config(config)
        assert folder is not None
        schedule = schedule_from_dict(config.noise_schedule)
        return folder.build(network, schedule, config.prediction, dtype or torch.float32, feature_layers)

    networks = [None if config.lora else backbone.get("network") for backbone in config.backbones]
    if None not in networks:
        experts = [build(network) for network in networks if network is not None]
        return routed(experts, config.boundaries).eval() if config.boundaries else experts[0]
    denoiser = load_base()
    if (lora := config.lora) and config.base_sha256 not in (None, base_sha256(config.base)):
        raise UserError(
            f"The adapter was trained on other weights than those of its base {config.base} now: their SHA-256 is not "
            f"{config.base_sha256}. Restore the base that it was trained on."
        )
    if lora:
        share_network(denoiser, lora.rank, lora.alpha, lora.targets)
    if config.boundaries:  # an expert without stored weights is the base
        trained = [any(name.startswith(f"experts.{k}.") for name in stored) for k in range(len(config.boundaries))]
        another = (lambda: copy.deepcopy(denoiser)) if lora else load_base
        experts = [
            build(network) if network is not None else another() if own_weights else denoiser
            for own_weights, network in zip(trained, networks, strict=True)
        ]
        return routed(experts, config.boundaries).eval()
    return (copy.deepcopy(denoiser) if lora else denoiser).eval()


def load_weights(module: nn.Module, file: Path) -> None:
    """Fills ``module`` from a safetensors file. Raises ``UserError`` on damage or if names or shapes do not match."""
    module.load_state_dict(_fitting(module, read_tensors(file), file))


def _replace_weights(module: nn.Module, tensors: dict[str, Tensor], weights: Path, *, keep_types: bool) -> None:
    """The same without a copy: files are mapped into memory, and the tensors of ``module`` are released one by one.
    They get the types of the files with ``keep_types``, and otherwise keep their own."""
    tensors, own = _fitting(module, tensors, weights), module.state_dict(keep_vars=True)
    for name, tensor in own.items():
        tensor.data = tensors.pop(name) if keep_types else tensors.pop(name).to(tensor.dtype)


def _fitting(module: nn.Module, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises ``UserError`` if they are not those of ``module`` by name and shape."""
    own = module.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise UserError(
            f"{file} does not belong to this network: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(unknown)} unknown (first: {unknown[:1]}). Check that it belongs to this model."
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{file}: {name} has shape {list(tensor.shape)}, the network needs {list(own[name].shape)}. "
                "Check that config.json belongs to these weights."
            )
    return tensors
