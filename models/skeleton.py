"""Networks without weights, built from configs alone on torch's meta device: for counting, not for computing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, GuidanceStyle, Routed
from fewstep.models.hub.published import PUBLISHED, Published
from fewstep.models.loading import TEACHERS, is_pipeline, read_config, resolve_path
from fewstep.models.model_config import ModelConfig, Size, with_settings
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


def skeleton(source: str, size: Size | None, dtype: torch.dtype, changed: Settings = MappingProxyType({})) -> Skeleton:
    """The network of a bundled model, a folder, or a published pipeline by hub id, with weights of ``dtype``, or one
    with ``changed`` settings.

    Raises ``UserError`` if ``source`` is none of these, or a student with several experts.
    """
    from fewstep.models.hub.folder import PipelineFolder  # needs the extra

    folder = resolve_path(source)
    if source in PUBLISHED and not folder.exists():
        published = PUBLISHED[source]
        return _of_pipeline(published._replace(settings={**published.settings, **changed}), {}, size, dtype)
    if (folder / "model_index.json").is_file():
        opened = PipelineFolder.open(folder)
        family = opened.family
        network, settings = opened.index[family.part][1], {**family.network, **changed}
        published = Published(opened.index["_class_name"], network, settings, opened.boundaries)
        return _of_pipeline(published, family.vae, size, dtype)
    if source in TEACHERS or is_pipeline(source) or not (folder / "config.json").is_file():
        raise UserError(
            f"The memory of {source!r} is planned from its config files, which were not found: give a folder with them "
            f"(weights are not needed), a bundled model, or one of {', '.join(sorted(PUBLISHED))}."
        )
    return skeleton_of(read_config(folder), size, dtype, changed)


def skeleton_of(
    config: ModelConfig, size: Size | None = None, dtype: torch.dtype = torch.float32,
    changed: Settings = MappingProxyType({}),
) -> Skeleton:  # fmt: skip
    """The network of a model config. Raises ``UserError`` if it has several experts."""
    if config.boundaries:
        raise UserError("The memory of a model with several experts by noise level cannot be planned.")
    if config.takes_prompts and config.base is not None:
        return skeleton(config.base, size, dtype, {**config.backbone.get("network", {}), **changed})
    if config.base is not None and not changed:
        return skeleton(config.base, size, dtype)
    config = config.model_copy(update={"backbone": with_settings(config.backbone, changed)})
    with META:
        denoiser = config.build()
    condition: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"labels": ((), torch.int64)} if config.classes else {}
    if config.vocabulary is not None:
        condition["words"] = ((config.vocabulary.length,), torch.int64)
    return Skeleton(denoiser, config.shape, condition)


class AlikeExperts(Routed):
    """Experts by noise level of one size: an evaluation costs that of the first, whatever its times."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.experts[0](x_t, t, condition)
        return out


def _of_pipeline(published: Published, vae: Settings, size: Size | None, dtype: torch.dtype) -> Skeleton:
    from fewstep.models.hub.family import HubBackbone, family_of  # needs the extra
    from fewstep.models.hub.folder import cast_weights, require_diffusers

    cls = family_of(published.pipeline)
    build: Any = cls.classes.get(published.network) or getattr(require_diffusers(), published.network)
    with META:
        modules = [build.from_config(dict(published.settings)) for _ in published.boundaries or [0.0]]
    family = cls(dict(modules[0].config), vae)
    for module in modules:
        cast_weights(module, dtype)
    experts = [HubBackbone(family, module) for module in modules]
    backbone = AlikeExperts(experts, published.boundaries) if published.boundaries else experts[0]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in family.condition_shapes.items():
        tokens = (cls.prompt_tokens, *shape[1:]) if name in ("prompt", "mask") else shape
        shapes[name] = (tokens, torch.int64 if name == "mask" else torch.float32)
    if family.embeds_guidance:
        shapes["guidance"] = ((), torch.float32)
    denoiser = Denoiser(backbone, RectifiedFlow(), style=GuidanceStyle(embedded=family.embeds_guidance))
    return Skeleton(denoiser.eval(), family.shape(*(size or family.default_size)), shapes)


def encoded_shapes(folder: str | Path | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the condition's tensors in a folder of ``fewstep data encode``, without the batch axis; empty if
    there is none yet."""
    from safetensors import safe_open

    file = Path(folder or "") / "null.safetensors"
    if folder is None or not file.is_file():
        return {}
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()[1:]) for name in tensors.keys()}  # noqa: SIM118, a file's names, not a dict
