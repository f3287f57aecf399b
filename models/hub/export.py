"""Exporting students for other programs: diffusers pipelines, LoRA files for diffusers, PEFT and ComfyUI, networks.

An export is written to a temporary folder, read back, compared with the student, and only then renamed. Networks are
merged, written and read back one at a time, and what is read back is mapped into memory. So the student, and the layers
that an adapter changes, are all that must fit into memory.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_folder, require_empty, write_text
from fewstep.core.image_grid import save_image
from fewstep.core.json_files import read_json_object
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.guidance import guide
from fewstep.models.hub.card import ADAPTERS, SAMPLES, CardContent, license_of, model_card
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.export_lora import adapters_of, check_factors, load_adapter, write_adapter
from fewstep.models.hub.family import HubBackbone
from fewstep.models.hub.few_step_scheduler import scheduler_for
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.manifest import MANIFEST, Manifest
from fewstep.models.loading import Model, pipeline_of

TOLERANCE = 1e-4  # of the relative difference between the student and the export in float32
ROUNDING = 8  # the same in other types, whose rounding differs in sums of another order, in units of their precision


@dataclass(frozen=True)
class Expert:
    """A network of a student, which computes in the type of its weights, and the times at which it is evaluated; an
    ordinary student has one for all times. ``x`` and ``condition`` are the inputs of the check."""

    denoiser: Denoiser
    times: tuple[float, ...]
    x: Tensor
    condition: Condition

    @torch.no_grad()
    def outputs(self, denoiser: Denoiser) -> list[Tensor]:
        """The outputs of ``denoiser`` at the expert's times."""
        backbone = denoiser.backbone
        network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
        device = next(network.parameters()).device
        x, condition = self.x.to(device), self.condition.to(device)
        return [guide(denoiser, x, t, condition).out.raw.cpu() for t in self.times]

    def compare(self, ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
        """Raises ``UserError`` if outputs at the expert's times differ."""
        for t, our, their in zip(self.times, ours, theirs, strict=True):
            difference = ((our - their).norm() / our.norm()).item()
            if not difference < tolerance:
                raise UserError(f"Not exported: the export differs from the student by {difference:.2g} at t = {t:g}.")


def export(model: Model, form: ExportFormat, out: Path, card: CardContent | None = None) -> Path:
    """Writes a student, or another model based on a pipeline, in the format ``form`` to the new folder ``out`` and
    returns ``out``.

    ``diffusers``: a pipeline whose call, with the student's number of steps and guidance off, is the student; that of
    ``load_pipeline`` has these defaults.
    ``merged``: its denoiser alone. ``lora``: an adapter for ``load_lora_weights`` or PEFT. ``comfyui``: the same with
    the keys of ComfyUI. All contain a ``scheduler/`` with the student's times and a model card with the code that
    samples the student and with ``card``. A student with several experts gets files for each, and the code
    changes between them; a ``diffusers`` export of a family with two denoisers (Wan 2.2) needs no such code.

    Raises ``UserError``, and leaves no files, if the format does not support the model, if no scheduler has the
    student's times, if ``out`` is not empty, or if the export does not compute the same as the student.
    """
    require_empty(out)
    card = card or CardContent()
    folder = pipeline_of(model)
    if len(folder.parts) > 1 and form is not ExportFormat.diffusers:
        raise UserError(
            f"The pipeline {folder.name} has two denoisers, and a student of it is exported to diffusers only: in no "
            f"other format ({form}) would a program know which part of it is for which."
        )
    experts, boundaries = _experts(model, folder)
    scheduler = scheduler_for(folder, few) if (few := model.config.few_step) else None
    manifest = _manifest(model, folder, form, scheduler, boundaries)
    with atomic_folder(out, new=True) as part:
        if form in ADAPTERS:
            _write_adapters(model, experts, folder, part, manifest)
        else:
            if form is ExportFormat.diffusers:
                _copy_pipeline(folder, manifest, part)
            for expert, written in zip(experts, manifest.network_folders(part, folder.family), strict=True):
                _write_network(expert, folder, written)
        if scheduler is not None:
            scheduler.save_pretrained(part / "scheduler")
        write_text(json.dumps(manifest.content(), indent=2) + "\n", part / MANIFEST)
        if card.samples is not None:
            save_image(card.samples, part / SAMPLES)
        write_text(model_card(manifest, folder.family, card, license_of(folder.path)), part / "README.md")
    return out


def _manifest(
    model: Model, folder: PipelineFolder, form: ExportFormat, scheduler: Any, boundaries: tuple[float, ...]
) -> Manifest:
    sampling: dict[str, Any] = {}
    if few := model.config.few_step:
        sampling = {
            "num_inference_steps": len(few.times), "times": few.times, "rule": few.rule, "shift": few.shift,
            "guidance_scale": folder.family.guidance_off, "scheduler": type(scheduler).__name__,
        }  # fmt: skip
    return Manifest(
        form=form, pipeline=folder.index["_class_name"], network=folder.network_class.__name__, base=folder.name,
        base_sha256=folder.sha256, shape=model.config.shape, boundaries=boundaries, **sampling,
    )  # fmt: skip


def _experts(model: Model, folder: PipelineFolder) -> tuple[list[Expert], tuple[float, ...]]:
    """The experts of a model and their lowest times, none for one. Of a student, those that its steps need, with
    boundaries in the middle between two steps."""
    few, ours = model.config.few_step, model.denoiser
    found = _by_level(ours.backbone)
    if few:
        times = few.times
        of_expert = {k: [t for t in times if k == sum(t < low for _, low in found)] for k in range(len(found))}
        used = {k: own for k, own in of_expert.items() if own}
        lows = [(min(high) + max(low)) / 2 for high, low in pairwise(used.values())]
        found = [(found[k][0], low) for k, low in zip(used, [*lows, 0.0], strict=True)]
        at = list(used.values())
    else:
        at = [[1.0, 0.5]] if len(found) == 1 else [[low or 0.01] for _, low in found]
    x, condition = _inputs(folder, model.config.shape)
    experts = [
        Expert(Denoiser(network, ours.schedule, ours.kind, style=ours.style), tuple(own), x, condition)
        for (network, _), own in zip(found, at, strict=True)
    ]
    return experts, tuple(low for _, low in found) if len(found) > 1 else ()


def _by_level(backbone: nn.Module, low: float = 0.0, high: float = 2.0) -> list[tuple[nn.Module, float]]:
    """The networks that a backbone evaluates at times from ``low`` to ``high``, from noisy to clean, each with its
    lowest time. The adapter of two experts is merged into both."""
    if isinstance(backbone, AdapterView) and isinstance(backbone.shared_network, Routed):
        backbone = backbone.merged()
    if not isinstance(backbone, Routed):
        return [(backbone, low)]
    found: list[tuple[nn.Module, float]] = []
    for expert, boundary in zip(backbone.experts, backbone.boundaries, strict=True):
        if (lowest := max(low, boundary)) < high:
            found += _by_level(expert, lowest, high)
        high = min(high, boundary)
    return found


# --- networks ---------------------------------------------------------------------------------------------------------


def _merged(ours: Denoiser) -> Denoiser:
    """The denoiser with its adapter merged."""
    merged = ours.backbone.merged() if isinstance(ours.backbone, AdapterView) else ours.backbone
    return Denoiser(merged, ours.schedule, ours.kind, style=ours.style)


def _diffusers_network(backbone: nn.Module) -> Any:
    if not isinstance(backbone, HubBackbone):
        raise UserError(f"A {type(backbone).__name__} is not a diffusers network, so it cannot be exported as one.")
    return backbone.network


def _write_network(expert: Expert, folder: PipelineFolder, out: Path) -> None:
    """Writes the network of an expert, and compares the expert with it before and after."""
    merged = _merged(expert.denoiser)
    network = _diffusers_network(merged.backbone)
    written = expert.outputs(merged)
    expert.compare(expert.outputs(expert.denoiser), written, _tolerance(network.dtype))
    network.save_pretrained(out)
    _remove_origin(out / "config.json")
    expert.compare(written, expert.outputs(folder.denoiser(network.dtype, weights=out)), TOLERANCE)


def _remove_origin(file: Path) -> None:
    """Removes the path from which a component was loaded, which diffusers and transformers write into its config."""
    config = read_json_object(file)
    if config.pop("_name_or_path", None) is not None:
        write_text(json.dumps(config, indent=2) + "\n", file)


def _copy_pipeline(folder: PipelineFolder, manifest: Manifest, out: Path) -> None:
    """Copies all but the denoiser, and the scheduler if the student has its own."""
    part, index = folder.family.part, {**folder.index}
    kept = {name for name in index if folder.has_component(name)} - {*folder.parts}
    if manifest.scheduler is not None:
        kept -= {"scheduler"}
        index["scheduler"] = ["diffusers", manifest.scheduler]
    if second := manifest.second_denoiser(folder.family):
        index |= {second: index[part], folder.family.two_experts: manifest.boundaries[0]}
    elif len(folder.parts) > 1:  # the student's steps need one of the two
        index |= {folder.parts[1]: [None, None], folder.family.two_experts: None}
    for name in sorted(kept):
        if (folder.path / name).is_dir():
            shutil.copytree(folder.path / name, out / name)
    write_text(json.dumps(index, indent=2) + "\n", out / "model_index.json")
    for file in (out / "model_index.json", *out.glob("*/*config.json")):
        _remove_origin(file)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _write_adapters(model: Model, experts: list[Expert], folder: PipelineFolder, out: Path, manifest: Manifest) -> None:
    """Writes the adapter of each expert, and compares the expert with the base that has this adapter."""
    form, several = manifest.form, len(experts) > 1
    adapters, lora = adapters_of(model, [expert.denoiser.backbone for expert in experts])
    content = manifest.content()
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}
    for k, (expert, tensors) in enumerate(zip(experts, adapters, strict=True)):
        write_adapter(tensors, lora, folder.family, form, out, k, several, metadata)
        view = expert.denoiser.backbone
        assert isinstance(view, AdapterView)
        dtype = _diffusers_network(view.shared_network).dtype
        loaded = load_adapter(folder, form, out, k, several, dtype)
        check_factors(tensors, loaded)
        expert.compare(expert.outputs(expert.denoiser), expert.outputs(loaded), _tolerance(dtype))


# --- the check --------------------------------------------------------------------------------------------------------


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype == torch.float32 else ROUNDING * torch.finfo(dtype).eps


def _inputs(folder: PipelineFolder, shape: tuple[int, ...]) -> tuple[Tensor, Condition]:
    """Random latents and a random condition."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape[0], *(1,) * (len(shape) - 3), 8, 8, generator=generator)
    condition = Condition(
        {
            name: torch.ones(1, *size, dtype=torch.int64)
            if name == "mask"
            else torch.randn(1, *size, generator=generator)
            for name, size in folder.family.condition_shapes.items()
        }
    )
    return x, condition
