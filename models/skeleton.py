"""Networks without weights, built from configs alone on torch's meta device: for counting, not for computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.errors import UserError
from fewstep.models.denoiser import Denoiser, GuidanceStyle
from fewstep.models.loading import TEACHERS, is_pipeline, read_config, resolve_path
from fewstep.models.model_config import ModelConfig, Size
from fewstep.models.schedules import RectifiedFlow

META = torch.device("meta")
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Skeleton:
    """A denoiser on the meta device, with the shape [C, ...] of a sample and the shapes and types of the condition's
    tensors, without the batch axis. Its noise schedule is a stand-in."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    condition: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def skeleton(source: str, size: Size | None, dtype: torch.dtype) -> Skeleton:
    """The network of a bundled model, a folder, or a published pipeline by hub id, with weights of ``dtype``.

    Raises ``UserError`` if ``source`` is none of these, or has several networks.
    """
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra
    from fewstep.models.hub.published import PUBLISHED

    folder = resolve_path(source)
    if source in PUBLISHED and not folder.exists():
        pipeline, network, settings = PUBLISHED[source]
        return _of_pipeline(pipeline, network, settings, {}, size, dtype)
    if (folder / "model_index.json").is_file():
        opened = PipelineFolder.open(folder)
        family = opened.family
        network = opened.index[family.part][1]
        return _of_pipeline(opened.index["_class_name"], network, family.network, family.vae, size, dtype)
    if source in TEACHERS or is_pipeline(source) or not (folder / "config.json").is_file():
        raise UserError(
            f"The memory of {source!r} is planned from its config files, which were not found: give a folder with them "
            f"(weights are not needed), a bundled model, or one of {', '.join(sorted(PUBLISHED))}."
        )
    return skeleton_of(read_config(folder), size, dtype)


def skeleton_of(config: ModelConfig, size: Size | None = None, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The network of a model config. Raises ``UserError`` if it has several experts."""
    if config.boundaries:
        raise UserError("The memory of a model with several experts by noise level cannot be planned.")
    if config.base is not None:
        return skeleton(config.base, size, dtype)
    with META:
        denoiser = config.build()
    labels: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"labels": ((), torch.int64)} if config.classes else {}
    return Skeleton(denoiser, config.shape, labels)


def _of_pipeline(
    pipeline: str, network: str, settings: Settings, vae: Settings, size: Size | None, dtype: torch.dtype
) -> Skeleton:
    from fewstep.models.hub.family import HubBackbone, family_of  # needs the extra
    from fewstep.models.hub.folder import require_diffusers

    cls = family_of(pipeline)
    build: Any = cls.classes.get(network) or getattr(require_diffusers(), network)
    with META:
        module = build.from_config(dict(settings))
    family = cls(dict(module.config), vae)
    _cast(module, dtype)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in family.condition_shapes.items():
        tokens = (cls.prompt_tokens, *shape[1:]) if name in ("prompt", "mask") else shape
        shapes[name] = (tokens, torch.int64 if name == "mask" else torch.float32)
    if family.embeds_guidance:
        shapes["guidance"] = ((), torch.float32)
    denoiser = Denoiser(
        HubBackbone(family, module), RectifiedFlow(), style=GuidanceStyle(embedded=family.embeds_guidance)
    )
    return Skeleton(denoiser.eval(), family.shape(*(size or family.default_size)), shapes)


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights as diffusers does when it loads them: some of a network's modules stay float32."""
    float32 = set(network._keep_in_fp32_modules or ())  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        if not float32 & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def encoded_shapes(folder: str | Path | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the condition's tensors in a folder of ``fewstep data encode``, without the batch axis; empty if
    there is none yet."""
    from safetensors import safe_open

    file = Path(folder or "") / "null.safetensors"
    if folder is None or not file.is_file():
        return {}
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()[1:]) for name in tensors.keys()}  # noqa: SIM118, a file's names, not a dict
