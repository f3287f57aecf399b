"""A diffusers pipeline on disk or on the hub: its family, denoiser, text encoders and VAE."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.core.image_files import to_images
from fewstep.core.json_files import read_json_object
from fewstep.core.paths import is_hub_id, nearest_folder
from fewstep.core.torchvision_compat import prepare_torchvision
from fewstep.models.condition import Condition
from fewstep.models.denoiser import AUTO, Denoiser, GuidanceStyle, routed
from fewstep.models.hub.family import Family, HubBackbone, family_of
from fewstep.models.hub.noise_process import NoiseProcess, noise_process
from fewstep.models.hub.weights import refuse_pickles, stored_dtype, variant_of, weight_files, weights_sha256
from fewstep.models.prediction import Kind
from fewstep.models.schedules import NoiseSchedule

TEXT = ("text_encoder", "tokenizer")  # how the names of a pipeline's text encoders begin


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that ``DiffusionPipeline.from_pretrained`` can load."""

    path: Path

    @staticmethod
    def open(source: str | Path) -> PipelineFolder:
        """A local folder, or a hub id (``owner/name``), which is downloaded if it is not in the hub's cache.

        Raises ``UserError`` if it does not exist, or if its family is not supported.
        """
        path = Path(source)
        if not (path / "model_index.json").is_file():
            path = _download(str(source))
        folder = PipelineFolder(path)
        _ = folder.family
        return folder

    @property
    def name(self) -> str:
        """The hub id of a folder in the hub's cache (``models--owner--name/snapshots/HASH``), or the folder's name."""
        path = self.path.resolve()
        kind, _, name = path.parents[1].name.partition("--") if path.parent.name == "snapshots" else ("", "", "")
        return name.replace("--", "/") if kind == "models" else path.name

    @cached_property
    def index(self) -> dict[str, Any]:
        """``model_index.json``. Raises ``UserError`` on a component that is not a library and a class, or two nulls."""
        file = self.path / "model_index.json"
        content = read_json_object(file)
        for name, entry in content.items():
            if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
                continue
            if len(entry) != 2 or not all(isinstance(each, str) for each in entry):
                raise UserError(f"{file}: {name} must be a library and a class, or two nulls, got {entry}. Restore it.")
        return content

    @cached_property
    def family(self) -> Family:
        cls = family_of(str(self.index.get("_class_name")))
        if not self.has_component(cls.part):
            raise UserError(
                f"{self.path / 'model_index.json'} has no {cls.part}, the network that denoises. Restore it."
            )
        vae = read_json_object(self.path / "vae" / "config.json") if self.has_component("vae") else {}
        return cls(read_json_object(self.path / cls.part / "config.json"), vae)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that denoise: one, or two experts by noise level, the one for high levels first (Wan 2.2)."""
        second = f"{self.family.part}_2"
        return (self.family.part, second) if self.has_component(second) else (self.family.part,)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The lowest times of the experts; empty for one network. Raises ``UserError`` if the index has no boundary."""
        if len(self.parts) == 1:
            return ()
        boundary = self.index.get(self.family.two_experts) if self.family.two_experts else None
        if not isinstance(boundary, float) or not 0 < boundary < 1:
            name = self.family.two_experts or "boundary"
            raise UserError(
                f"{self.path} has two denoisers, but {name} = {boundary} in its model_index.json does not say where "
                "one takes over from the other: it must lie between 0 and 1."
            )
        return boundary, 0.0

    @cached_property
    def noise_process(self) -> NoiseProcess:
        scheduler = self.scheduler_config
        if (steps := scheduler.get("num_train_timesteps", 1000)) != 1000:
            raise UserError(f"{self.path} has {steps} training timesteps (num_train_timesteps); supported: 1000.")
        try:
            return noise_process(scheduler)
        except UserError as error:
            raise UserError(f"{self.path / 'scheduler'}: {error}") from error

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """``scheduler_config.json``."""
        return read_json_object(self.path / "scheduler" / "scheduler_config.json")

    def has_component(self, component: str) -> bool:
        """Whether the folder has a component; components that it was saved without are null in the index."""
        entry = self.index.get(component)
        return isinstance(entry, list) and bool(entry) and entry[0] is not None

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights that denoise. Raises ``UserError`` if they are missing."""
        return weights_sha256([file for part in self.parts for file in weight_files(self.path / part)])

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the pipeline's denoiser is loaded by default (see ``stored_dtype``)."""
        return stored_dtype(self.path / self.family.part)

    @property
    def network_class(self) -> Any:
        """The class of the pipeline's denoiser."""
        return self._class(self.index[self.family.part][1])

    def _class(self, name: str) -> Any:
        found = self.family.classes.get(name) or getattr(require_diffusers(), name, None)
        if found is None:
            raise UserError(f"{self.path} needs the class {name!r}, which this version of diffusers does not have.")
        return found

    def denoiser(
        self, dtype: torch.dtype | None = torch.float32, feature_layers: Sequence[str] = (), weights: Path | None = None
    ) -> Denoiser:
        """The pipeline's denoiser, of two experts if it has two, or one with the weights in the folder ``weights``, in
        eval mode on the CPU; a ``dtype`` of None is that of ``stored_dtype``. Weights of this type are mapped into
        memory, not copied.

        Raises ``UserError`` if the weights are damaged or stored in pickle files.
        """
        if weights is None and len(self.parts) > 1:
            experts = [self.denoiser(dtype, feature_layers, self.path / part) for part in self.parts]
            return routed(experts, self.boundaries).eval()
        folder, module = weights or self.path / self.family.part, self.network_class
        refuse_pickles(folder)
        dtype = dtype or stored_dtype(folder)
        try:
            with _without_progress_bars():
                network = module.from_pretrained(folder, dtype=dtype, variant=variant_of(folder), use_safetensors=True)
        except Exception as error:  # on damaged files almost every type
            raise UserError(f"The network in {folder} cannot be loaded: {_first_line(error)}") from error
        return self._denoiser(network, self.noise_process.schedule, self.noise_process.kind, feature_layers)

    def build(
        self, settings: Mapping[str, Any], schedule: NoiseSchedule, kind: Kind, dtype: torch.dtype = torch.float32,
        feature_layers: Sequence[str] = (),
    ) -> Denoiser:  # fmt: skip
        """A new network of the class of the pipeline's denoiser, randomly initialised, in eval mode on the CPU.

        Raises ``UserError`` on settings of which no network can be built.
        """
        cls = self.network_class
        try:
            with _without_progress_bars():
                network = cls.from_config(dict(settings)).eval()
        except Exception as error:  # of many types, with settings that do not fit together
            raise UserError(f"No {cls.__name__} can be built from these settings: {_first_line(error)}") from error
        cast_weights(network, dtype)
        return self._denoiser(network, schedule, kind, feature_layers)

    def _denoiser(self, network: Any, schedule: NoiseSchedule, kind: Kind, feature_layers: Sequence[str]) -> Denoiser:
        settings = {name: value for name, value in network.config.items() if not name.startswith("_")}
        family = type(self.family)({**self.family.network, **settings}, self.family.vae)
        own = type(family).postprocess_guidance is not Family.postprocess_guidance
        style = GuidanceStyle(family.embeds_guidance, family.postprocess_guidance if own else None)
        paths = [path if path == AUTO else f"network.{path}" for path in feature_layers]
        return Denoiser(HubBackbone(family, network), schedule, kind, paths, style).eval()

    def require_settings(self, names: Iterable[str]) -> None:
        """Raises ``UserError`` if the class of the pipeline's denoiser has no setting of one of these names."""
        known = [name for name in inspect.signature(self.network_class.__init__).parameters if name != "self"]
        if unknown := sorted(set(names) - set(known)):
            raise UserError(
                f"A {self.network_class.__name__} has no setting {unknown[0]!r}{nearest(unknown[0], known)}."
            )

    @staticmethod
    def network_settings(folder: Path) -> dict[str, Any]:
        """The settings of a network that diffusers saved in ``folder``."""
        content = read_json_object(folder / "config.json")
        return {name: value for name, value in content.items() if not name.startswith("_")}

    def pipeline(self, denoiser: Any = None, dtype: torch.dtype = torch.float32) -> Any:
        """The full diffusers pipeline, with ``denoiser`` (None: without, which is enough to encode and decode).

        Raises ``UserError`` if a component is damaged, missing, or stored in pickle files.
        """
        return self._load(denoiser, dtype, set(self.index))

    def decoder(self) -> Any:
        """The pipeline without denoiser and text encoders, which is enough to decode. Raises as ``pipeline`` does."""
        return self._load(None, torch.float32, {name for name in self.index if not name.startswith(TEXT)})

    def bare(self, denoiser: Any) -> Any:
        """The pipeline with its denoiser alone, which is enough to load an adapter. Raises as ``pipeline`` does."""
        return self._load(denoiser, torch.float32, set())

    def _load(self, denoiser: Any, dtype: torch.dtype, parts: set[str]) -> Any:
        used = [name for name in self.index if name in parts and self.has_component(name) and name not in self.parts]
        for name in used:
            refuse_pickles(self.path / name)
        variants = {variant_of(self.path / name) for name in self.index} - {None}
        components = {name for name, entry in self.index.items() if isinstance(entry, list)}
        given = dict.fromkeys(components - {*used, "scheduler"}) | {self.family.part: denoiser}
        cls = self._class(self.index["_class_name"])
        try:
            with _without_progress_bars():
                variant = next(iter(variants), None)  # of the components that have no other
                return cls.from_pretrained(self.path, dtype=dtype, variant=variant, use_safetensors=True, **given)
        except Exception as error:  # on damaged files almost every type
            raise UserError(f"The pipeline in {self.path} cannot be loaded: {_first_line(error)}") from error

    @torch.no_grad()
    def condition(self, pipeline: Any, prompts: Sequence[str], batch: int = 16) -> Condition:
        """The condition of prompts, and the pipeline's null condition, from the text encoders of ``pipeline``."""
        parts = [self.family.encode(pipeline, prompts[low : low + batch]) for low in range(0, len(prompts), batch)]
        null = self.family.encode(pipeline, [""])
        return Condition({name: torch.cat([part[name] for part in parts]) for name in null}, null)

    @torch.no_grad()
    def decode_images(self, pipeline: Any, latents: Tensor, batch: int = 8) -> Tensor:
        """Images, uint8 [N, 3, H, W], or videos, uint8 [N, F, 3, H, W], decoded by the VAE of ``pipeline``."""
        parts = [self.family.decode(pipeline, latents[low : low + batch]) for low in range(0, len(latents), batch)]
        return to_images(torch.cat(parts)).cpu()


def cast_weights(network: Any, dtype: torch.dtype) -> None:
    """Casts the weights as diffusers does when it loads them: some of a network's modules stay float32."""
    float32 = set(network._keep_in_fp32_modules or ())
    for name, parameter in network.named_parameters():
        if not float32 & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def require_diffusers() -> Any:
    """The diffusers package. Raises ``UserError`` if it is not installed."""
    prepare_torchvision()
    try:
        import diffusers
    except ImportError as error:
        raise UserError("Diffusers pipelines need an extra: pip install 'fewstep[diffusers]'.") from error
    return diffusers


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hides the progress bars that diffusers and transformers show for every file they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def _download(name: str) -> Path:
    if not is_hub_id(name):
        hint = "" if Path(name).exists() else nearest_folder(Path(name))
        if (Path(name) / "config.json").is_file():
            hint = "; it is a model of fewstep, whose captions need no encoding (data.kind=prompts reads them as text)"
        raise UserError(f"{name} is not a diffusers pipeline: model_index.json is missing{hint}.")
    diffusers = require_diffusers()
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # many types: offline, model does not exist, access denied
        raise UserError(
            f"{name!r} is neither a folder nor a pipeline in the hub's cache, and the download failed: "
            f"{_first_line(error)} Download it yourself and pass the folder."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
