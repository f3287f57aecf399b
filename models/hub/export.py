"""Exporting students for other programs: diffusers pipelines, LoRA files for diffusers, PEFT and ComfyUI, networks.

An export is written to a temporary folder, read back, compared with the student, and only then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, sha256, write_tensors, write_text
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import guide
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.family import HubBackbone
from fewstep.models.hub.folder import PipelineFolder, require_diffusers
from fewstep.models.loading import Model, is_pipeline, pipeline_of
from fewstep.models.model_config import FewStep, Lora
from fewstep.models.schedules import RectifiedFlow

LORA_FILE = "pytorch_lora_weights.safetensors"
TOLERANCE = 1e-4  # of the relative difference between the student and the export


def export(model: Model, form: ExportFormat, out: Path, card: str = "") -> Path:
    """Writes a student, or another model based on a pipeline, in the format ``form`` to the new folder ``out`` and
    returns ``out``.

    ``diffusers``: a pipeline whose default call, with the student's number of steps, samples like the student.
    ``merged``: its denoiser alone. ``lora``: an adapter for ``load_lora_weights`` and PEFT. ``comfyui``: the same with
    kohya's keys. ``card`` is added to the model card. Raises ``UserError``, and leaves no files, if the format does not
    support the model, if ``out`` is not empty, or if the export does not compute the same as the student.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder.")
    folder = pipeline_of(model)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        manifest = manifest_of(model, folder)
        if form in (ExportFormat.lora, ExportFormat.comfyui):
            if form is ExportFormat.comfyui and not folder.family.loads_lora:
                raise UserError(f"{folder.index['_class_name']} has no ComfyUI keys for LoRA; export it to lora.")
            _write_lora(model, folder, part / LORA_FILE, form, manifest)
            _check_lora(model, folder, part / LORA_FILE)
        else:
            network = _merged(model.denoiser.backbone)
            if form is ExportFormat.merged:
                _write_network(network, part)
            else:
                _write_pipeline(folder, network, model.config.few_step, part)
            _check_network(model, folder, part if form is ExportFormat.merged else part / folder.family.part)
        write_text(json.dumps(manifest, indent=2) + "\n", part / "fewstep.json")
        write_text(model_card(manifest, form, card), part / "README.md")
        if out.exists():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error}. Free some space or choose another folder.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def manifest_of(model: Model, folder: PipelineFolder) -> dict[str, Any]:
    """The settings needed for sampling: steps, times, rule, shift, guidance, adapter scale, and the base model."""
    manifest = {
        "format": "fewstep-export", "pipeline": folder.index["_class_name"], "lora_scale": 1.0,
        "base": folder.path.name, "base_sha256": weights_sha256(folder),
    }  # fmt: skip
    if few := model.config.few_step:
        manifest |= {
            "num_inference_steps": len(few.times), "times": list(few.times), "rule": few.rule, "shift": few.shift,
            "guidance_scale": 1.0,
        }  # fmt: skip
    return manifest


def weights_sha256(folder: PipelineFolder) -> str:
    """SHA-256 of the weight files of the pipeline's denoiser."""
    return sha256(*sorted((folder.path / folder.family.part).glob("*.safetensors")))


def model_card(manifest: Mapping[str, Any], form: ExportFormat, text: str) -> str:
    """The README of an export."""
    if "times" in manifest:
        steps, times = manifest["num_inference_steps"], ", ".join(f"{t:.4g}" for t in manifest["times"])
        lines = [
            f"# A {steps}-step student of {manifest['base']}",
            "",
            f"Sample with `num_inference_steps={steps}` and guidance off (`guidance_scale=1.0`).",
            f"The times are {times} (1 is noise); the rule between them is `{manifest['rule']}`.",
        ]
    else:
        lines = [f"# {manifest['base']}, fine-tuned", "", "Sample it like its base model."]
    if form in (ExportFormat.lora, ExportFormat.comfyui):
        lines.append("This is an adapter: use it with a scale of 1 on the base model whose hash is in `fewstep.json`.")
    return "\n".join([*lines, "", text]).rstrip() + "\n"


# --- networks ---------------------------------------------------------------------------------------------------------


def _merged(backbone: nn.Module) -> Any:
    """The diffusers network of a student, with its adapter merged."""
    merged = backbone.merged() if isinstance(backbone, AdapterView) else backbone
    if not isinstance(merged, HubBackbone):
        raise UserError(f"A {type(merged).__name__} is not a diffusers network, so it cannot be exported as one.")
    return merged.network


def _write_network(network: Any, folder: Path) -> None:
    """Saves a network without the path that it was loaded from, which diffusers writes into the config."""
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    write_text(json.dumps(config, indent=2) + "\n", folder / "config.json")


def _write_pipeline(folder: PipelineFolder, network: Any, few_step: FewStep | None, out: Path) -> None:
    part = folder.family.part
    shutil.copytree(folder.path, out, dirs_exist_ok=True, ignore=lambda path, names: _ignored(folder, path, names))
    _write_network(network, out / part)
    index = folder.index
    if few_step is None:
        shutil.copytree(folder.path / "scheduler", out / "scheduler")
    else:
        scheduler = scheduler_for(folder, few_step)
        scheduler.save_pretrained(out / "scheduler")
        index = {**index, "scheduler": ["diffusers", type(scheduler).__name__]}
    write_text(json.dumps(index, indent=2) + "\n", out / "model_index.json")


def _ignored(folder: PipelineFolder, path: str, names: list[str]) -> set[str]:
    """Everything at the top level of the pipeline's folder except the components to copy."""
    if Path(path) != folder.path:
        return set()
    kept = {name for name in names if folder.has_component(name)} - {folder.family.part, "scheduler"}
    return set(names) - kept


def scheduler_for(folder: PipelineFolder, few_step: FewStep) -> Any:
    """A diffusers scheduler whose default times, with the student's number of steps, are the student's.

    Raises ``UserError`` if no scheduler makes the pipeline's default call use these times.
    """
    diffusers = require_diffusers()
    renoise, steps, shift = few_step.rule == "renoise", len(few_step.times), few_step.shift
    own = json.loads((folder.path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if not isinstance(folder.noise_process.schedule, RectifiedFlow):
        if shift != 1:
            raise UserError(f"A discrete schedule does not support times with shift {shift:g}: train with shift: 1.")
        betas = {k: own[k] for k in ("beta_start", "beta_end", "beta_schedule", "prediction_type") if k in own}
        common = {**betas, "num_train_timesteps": own.get("num_train_timesteps", 1000), "clip_sample": False}
        if renoise:
            return diffusers.LCMScheduler(**common, original_inference_steps=1000)
        return diffusers.DDIMScheduler(**common, timestep_spacing="trailing", steps_offset=1)
    euler = diffusers.FlowMatchLCMScheduler if renoise else diffusers.FlowMatchEulerDiscreteScheduler
    if folder.family.passes_sigmas:
        return euler(shift=shift)
    if shift == 1:  # the scheduler spaces its times uniformly from 1 to shift_terminal
        return euler(shift=1.0, shift_terminal=1 / steps if steps > 1 else None)
    if renoise:
        raise UserError(
            f"The default call of {folder.index['_class_name']} does not take times, so it cannot sample a renoising "
            f"student with shift {shift:g}; train with shift: 1, or with a deterministic rule (tdm)."
        )
    return diffusers.DPMSolverMultistepScheduler(
        solver_order=1, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )


def _check_network(model: Model, folder: PipelineFolder, written: Path) -> None:
    diffusers = require_diffusers()
    cls = getattr(diffusers, folder.index[folder.family.part][1])
    exported = Denoiser(
        HubBackbone(folder.family, cls.from_pretrained(written)), model.denoiser.schedule, model.denoiser.kind,
        style=model.denoiser.style,
    )  # fmt: skip
    _compare(model, exported, folder)


@torch.no_grad()
def _compare(model: Model, exported: Denoiser, folder: PipelineFolder) -> None:
    """Compares both at the student's times, on random latents with a random condition. Raises ``UserError``."""
    few = model.config.few_step
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
    for t in few.times if few else (1.0, 0.5):
        ours = guide(model.denoiser, x.to(device), t, condition.to(device)).out.raw.cpu()
        theirs = guide(exported, x, t, condition).out.raw
        difference = ((ours - theirs).norm() / ours.norm()).item()
        if not difference < TOLERANCE:
            raise UserError(f"Not exported: the export differs from the student by {difference:.2g} at t = {t:g}.")


# --- adapters ---------------------------------------------------------------------------------------------------------


def _adapter(model: Model) -> tuple[dict[str, Tensor], Lora]:
    view, lora = model.denoiser.backbone, model.config.lora
    if not isinstance(view, AdapterView) or lora is None:
        raise UserError("This student is not an adapter (no adapters: in its config); export to diffusers or merged.")
    if model.config.base is None or not is_pipeline(model.config.base):
        raise UserError(
            f"The base of this adapter, {model.config.base}, is not a pipeline but a student; export it to diffusers."
        )
    return {name.removeprefix("network."): tensor for name, tensor in view.state_dict().items()}, lora


def _write_lora(model: Model, folder: PipelineFolder, file: Path, form: ExportFormat, manifest: dict[str, Any]) -> None:
    tensors, lora = _adapter(model)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in manifest.items()}
    if form is ExportFormat.lora:
        part = folder.family.part
        metadata["lora_adapter_metadata"] = json.dumps({f"{part}.{key}": value for key, value in _peft(lora).items()})
        write_tensors({f"{part}.{name}": tensor for name, tensor in tensors.items()}, file, metadata)
        return
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, which = name.removesuffix(".weight").rpartition(".")
        layer = folder.family.comfyui(path)
        if which == "lora_B":  # the scale is multiplied into the weights, because loaders treat alpha differently
            tensor = tensor * (lora.alpha / lora.rank)
        if layer.startswith("lora_"):
            which = {"lora_A": "lora_down", "lora_B": "lora_up"}[which]
            named[f"{layer}.alpha"] = torch.tensor(float(lora.rank))
        named[f"{layer}.{which}.weight"] = tensor
    write_tensors(named, file, metadata | {"ss_network_dim": str(lora.rank), "ss_network_alpha": str(lora.rank)})


def _peft(lora: Lora) -> dict[str, Any]:
    return {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}


def _check_lora(model: Model, folder: PipelineFolder, file: Path) -> None:
    """Loads the file into the base with diffusers' loader or, if the pipeline has none, with PEFT, and compares."""
    denoiser = folder.denoiser()
    assert isinstance(denoiser.backbone, HubBackbone)
    network = denoiser.backbone.network
    if folder.family.loads_lora:
        folder.pipeline(network).load_lora_weights(file.parent, weight_name=file.name)
    else:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        tensors = {name.removeprefix(f"{folder.family.part}."): t for name, t in read_tensors(file).items()}
        lora = model.config.lora
        assert lora is not None
        inject_adapter_in_model(LoraConfig(**_peft(lora)), network)
        set_peft_model_state_dict(network, tensors)
    _compare(model, denoiser, folder)
