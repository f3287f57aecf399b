"""Exporting students for other programs: diffusers pipelines, LoRA files for diffusers, PEFT and ComfyUI, networks.

An export is written to a temporary folder, read back, compared with the student, and only then renamed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_folder, read_json_object, require_empty, write_text
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.guidance import guide
from fewstep.models.hub.card import ADAPTERS, model_card
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.export_lora import adapters_of, load_adapter, write_adapter
from fewstep.models.hub.family import HubBackbone
from fewstep.models.hub.few_step_scheduler import scheduler_for
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.manifest import MANIFEST, Manifest
from fewstep.models.loading import Model, pipeline_of

TOLERANCE = 1e-4  # of the relative difference between the student and the export


@dataclass(frozen=True)
class Expert:
    """A network of a student, which computes in float32, and the times at which it is evaluated; an ordinary student
    has one for all times."""

    denoiser: Denoiser
    times: tuple[float, ...]


def export(model: Model, form: ExportFormat, out: Path, card: str = "") -> Path:
    """Writes a student, or another model based on a pipeline, in the format ``form`` to the new folder ``out`` and
    returns ``out``.

    ``diffusers``: a pipeline whose default call, with the student's number of steps, samples like the student.
    ``merged``: its denoiser alone. ``lora``: an adapter for ``load_lora_weights`` or PEFT. ``comfyui``: the same with
    the keys of ComfyUI. All contain a ``scheduler/`` with the student's times and a model card with the code that
    samples the student, to which ``card`` is added. A student with several experts gets files for each, and the code
    changes between them; a ``diffusers`` export of a family with two denoisers (Wan 2.2) needs no such code.

    Raises ``UserError``, and leaves no files, if the format does not support the model, if no scheduler has the
    student's times, if ``out`` is not empty, or if the export does not compute the same as the student.
    """
    require_empty(out)
    folder, experts = pipeline_of(model), _experts(model)
    scheduler = scheduler_for(folder, few) if (few := model.config.few_step) else None
    manifest = _manifest(model, folder, form, scheduler)
    with atomic_folder(out) as part:
        if form in ADAPTERS:
            exported = _write_adapters(model, experts, folder, part, manifest)
        else:
            if form is ExportFormat.diffusers:
                _copy_pipeline(folder, manifest, part)
            folders = manifest.network_folders(part, folder.family)
            for expert, written in zip(experts, folders, strict=True):
                _write_network(_merged(expert.denoiser.backbone), written)
            exported = [folder.denoiser(weights=written) for written in folders]
        if scheduler is not None:
            scheduler.save_pretrained(part / "scheduler")
        for expert, theirs in zip(experts, exported, strict=True):
            _compare(expert, theirs, folder, model)
        write_text(json.dumps(manifest.content(), indent=2) + "\n", part / MANIFEST)
        write_text(model_card(manifest, folder.family, card), part / "README.md")
    return out


def _manifest(model: Model, folder: PipelineFolder, form: ExportFormat, scheduler: Any) -> Manifest:
    sampling: dict[str, Any] = {}
    if few := model.config.few_step:
        sampling = {
            "num_inference_steps": len(few.times), "times": few.times, "rule": few.rule, "shift": few.shift,
            "guidance_scale": folder.family.guidance_off, "scheduler": type(scheduler).__name__,
        }  # fmt: skip
    return Manifest(
        form=form, pipeline=folder.index["_class_name"], network=folder.network_class.__name__, base=folder.name,
        base_sha256=folder.sha256, shape=model.config.shape, boundaries=model.config.boundaries or (), **sampling,
    )  # fmt: skip


def _experts(model: Model) -> list[Expert]:
    denoiser, few = model.denoiser, model.config.few_step
    times = few.times if few else (1.0, 0.5)
    backbone = denoiser.backbone
    if isinstance(backbone, Routed):
        networks = list(backbone.experts)
        experts = backbone.expert_of(torch.tensor(times, dtype=torch.float64)).tolist()
    else:
        networks, experts = [backbone], [0] * len(times)
    return [
        Expert(
            Denoiser(network, denoiser.schedule, denoiser.kind, style=denoiser.style),
            tuple(t for t, own in zip(times, experts, strict=True) if own == k),
        )
        for k, network in enumerate(networks)
    ]


# --- networks ---------------------------------------------------------------------------------------------------------


def _merged(backbone: nn.Module) -> Any:
    """The diffusers network of a student, with its adapter merged."""
    merged = backbone.merged() if isinstance(backbone, AdapterView) else backbone
    if not isinstance(merged, HubBackbone):
        raise UserError(f"A {type(merged).__name__} is not a diffusers network, so it cannot be exported as one.")
    return merged.network


def _write_network(network: Any, folder: Path) -> None:
    network.save_pretrained(folder)
    _remove_origin(folder / "config.json")


def _remove_origin(file: Path) -> None:
    """Removes the path from which a component was loaded, which diffusers and transformers write into its config."""
    config = read_json_object(file)
    if config.pop("_name_or_path", None) is not None:
        write_text(json.dumps(config, indent=2) + "\n", file)


def _copy_pipeline(folder: PipelineFolder, manifest: Manifest, out: Path) -> None:
    """Copies all but the denoiser, and the scheduler if the student has its own."""
    part, index = folder.family.part, {**folder.index}
    kept = {name for name in index if folder.has_component(name)} - {part}
    if manifest.scheduler is not None:
        kept -= {"scheduler"}
        index["scheduler"] = ["diffusers", manifest.scheduler]
    if second := manifest.second_denoiser(folder.family):
        index |= {second: index[part], folder.family.two_experts: manifest.boundaries[0]}
    for name in sorted(kept):
        if (folder.path / name).is_dir():
            shutil.copytree(folder.path / name, out / name)
    write_text(json.dumps(index, indent=2) + "\n", out / "model_index.json")
    for file in (out / "model_index.json", *out.glob("*/*config.json")):
        _remove_origin(file)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _write_adapters(
    model: Model, experts: list[Expert], folder: PipelineFolder, out: Path, manifest: Manifest
) -> list[Denoiser]:
    """Writes the adapter of each expert, and returns the base with each of them."""
    form, several = manifest.form, len(experts) > 1
    adapters, lora = adapters_of(model, [expert.denoiser.backbone for expert in experts])
    content = manifest.content()
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}
    for k, tensors in enumerate(adapters):
        write_adapter(tensors, lora, folder.family, form, out, k, several, metadata)
    return [load_adapter(folder, form, out, k, several) for k in range(len(experts))]


# --- the check --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compare(expert: Expert, exported: Denoiser, folder: PipelineFolder, model: Model) -> None:
    """Compares both at the expert's times, on random latents with a random condition. Raises ``UserError``."""
    generator = torch.Generator().manual_seed(0)
    shape = (model.config.shape[0], *(1,) * (len(model.config.shape) - 3), 8, 8)
    x = torch.randn(1, *shape, generator=generator)
    condition = Condition(
        {
            name: torch.ones(1, *size, dtype=torch.int64)
            if name == "mask"
            else torch.randn(1, *size, generator=generator)
            for name, size in folder.family.condition_shapes.items()
        }
    )
    device = model.device
    for t in expert.times:
        ours = guide(expert.denoiser, x.to(device), t, condition.to(device)).out.raw.cpu()
        theirs = guide(exported, x, t, condition).out.raw
        difference = ((ours - theirs).norm() / ours.norm()).item()
        if not difference < TOLERANCE:
            raise UserError(f"Not exported: the export differs from the student by {difference:.2g} at t = {t:g}.")
