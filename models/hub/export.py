"""Students as what other programs load: diffusers pipelines, LoRA files for diffusers, PEFT and ComfyUI, bare networks.

Everything is written aside, read back, compared with the student, and only then given its name.
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
TOLERANCE = 1e-4  # of the relative difference between the student and what is read back


def export(model: Model, form: ExportFormat, out: Path, card: str = "") -> Path:
    """Writes a student (or another model on a pipeline: one tuned or trained anew) as ``form`` into the new folder
    ``out`` and returns it.

    ``diffusers``: a pipeline that samples right with its default call at the student's number of steps. ``merged``: its
    denoiser alone. ``lora``: an adapter for ``load_lora_weights`` and PEFT. ``comfyui``: the same under kohya's keys.
    ``card`` goes into the model card. Raises ``UserError`` if the model cannot be exported so, if ``out`` is not empty,
    or if what was written does not read back as the student; then nothing is left behind.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder.")
    folder = pipeline_of(model)
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        manifest = manifest_of(model, folder)
        if form in (ExportFormat.lora, ExportFormat.comfyui):
            if form is ExportFormat.comfyui and not folder.family.loads_lora:
                raise UserError(f"There are no ComfyUI keys for {folder.index['_class_name']}; export to lora.")
            _write_lora(model, folder, aside / LORA_FILE, form, manifest)
            _check_lora(model, folder, aside / LORA_FILE)
        else:
            network = _plain(model.denoiser.backbone)
            if form is ExportFormat.merged:
                _write_network(network, aside)
            else:
                _write_pipeline(folder, network, model.config.few_step, aside)
            _check_network(model, folder, aside if form is ExportFormat.merged else aside / folder.family.part)
        write_text(json.dumps(manifest, indent=2) + "\n", aside / "fewstep.json")
        write_text(model_card(manifest, form, card), aside / "README.md")
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error}. Free some space or choose another folder.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def manifest_of(model: Model, folder: PipelineFolder) -> dict[str, Any]:
    """What one must know to sample: steps, times, rule, shift, no guidance, adapter scale 1, and which base."""
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
    """A hash of the files of the pipeline's denoiser."""
    return sha256(*sorted((folder.path / folder.family.part).glob("*.safetensors")))


def model_card(manifest: Mapping[str, Any], form: ExportFormat, text: str) -> str:
    """The README of an export."""
    if "times" in manifest:
        steps, times = manifest["num_inference_steps"], ", ".join(f"{t:.4g}" for t in manifest["times"])
        lines = [
            f"# A {steps}-step student of {manifest['base']}",
            "",
            f"Sample it with `num_inference_steps={steps}` and guidance off (`guidance_scale=1.0`).",
            f"Its times are {times} (1 is noise), {manifest['rule']} between them.",
        ]
    else:
        lines = [f"# {manifest['base']}, trained on", "", "Sample it as its base."]
    if form in (ExportFormat.lora, ExportFormat.comfyui):
        lines.append("It is an adapter: use it with a scale of 1 on the base that `fewstep.json` names by hash.")
    return "\n".join([*lines, "", text]).rstrip() + "\n"


# --- networks ---------------------------------------------------------------------------------------------------------


def _plain(backbone: nn.Module) -> Any:
    """The diffusers network of a student, its adapter merged."""
    whole = backbone.merged() if isinstance(backbone, AdapterView) else backbone
    if not isinstance(whole, HubBackbone):
        raise UserError(f"A {type(whole).__name__} is not a diffusers network, so it cannot be exported as one.")
    return whole.network


def _write_network(network: Any, folder: Path) -> None:
    """Without the place that it was loaded from, which diffusers would write into its config."""
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    write_text(json.dumps(config, indent=2) + "\n", folder / "config.json")


def _write_pipeline(folder: PipelineFolder, network: Any, few_step: FewStep | None, out: Path) -> None:
    part = folder.family.part
    shutil.copytree(folder.path, out, dirs_exist_ok=True, ignore=lambda path, names: _left_out(folder, path, names))
    _write_network(network, out / part)
    index = folder.index
    if few_step is None:
        shutil.copytree(folder.path / "scheduler", out / "scheduler")
    else:
        scheduler = scheduler_for(folder, few_step)
        scheduler.save_pretrained(out / "scheduler")
        index = {**index, "scheduler": ["diffusers", type(scheduler).__name__]}
    write_text(json.dumps(index, indent=2) + "\n", out / "model_index.json")


def _left_out(folder: PipelineFolder, path: str, names: list[str]) -> set[str]:
    """Everything in the pipeline's own folder but the components that are copied."""
    if Path(path) != folder.path:
        return set()
    kept = {name for name in names if folder.holds(name)} - {folder.family.part, "scheduler"}
    return set(names) - kept


def scheduler_for(folder: PipelineFolder, few_step: FewStep) -> Any:
    """A diffusers scheduler whose default times, at the student's number of steps, are the student's.

    Raises ``UserError`` where the pipeline's call cannot be brought to take them.
    """
    diffusers = require_diffusers()
    renoise, steps, shift = few_step.rule == "renoise", len(few_step.times), few_step.shift
    own = json.loads((folder.path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if not isinstance(folder.noise_process.schedule, RectifiedFlow):
        if shift != 1:
            raise UserError(f"Pipelines of a discrete schedule cannot take times shifted by {shift:g}: train with 1.")
        betas = {k: own[k] for k in ("beta_start", "beta_end", "beta_schedule", "prediction_type") if k in own}
        common = {**betas, "num_train_timesteps": own.get("num_train_timesteps", 1000), "clip_sample": False}
        if renoise:
            return diffusers.LCMScheduler(**common, original_inference_steps=1000)
        return diffusers.DDIMScheduler(**common, timestep_spacing="trailing", steps_offset=1)
    euler = diffusers.FlowMatchLCMScheduler if renoise else diffusers.FlowMatchEulerDiscreteScheduler
    if folder.family.passes_sigmas:
        return euler(shift=shift)
    if shift == 1:  # the scheduler spreads its times from 1 to this last one
        return euler(shift=1.0, shift_terminal=1 / steps if steps > 1 else None)
    if renoise:
        raise UserError(
            f"{folder.index['_class_name']} takes no times from outside, so a re-noising student with shift {shift:g} "
            "cannot be its default call; train with shift: 1, or with a deterministic rule (tdm)."
        )
    return diffusers.DPMSolverMultistepScheduler(
        solver_order=1, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )


def _check_network(model: Model, folder: PipelineFolder, written: Path) -> None:
    diffusers = require_diffusers()
    cls = getattr(diffusers, folder.index[folder.family.part][1])
    again = Denoiser(
        HubBackbone(folder.family, cls.from_pretrained(written)), model.denoiser.schedule, model.denoiser.kind,
        style=model.denoiser.style,
    )  # fmt: skip
    _compare(model, again, folder)


@torch.no_grad()
def _compare(model: Model, again: Denoiser, folder: PipelineFolder) -> None:
    """Both at the student's times on random latents and a random condition of the right shape."""
    few = model.config.few_step
    generator = torch.Generator().manual_seed(0)
    shape = (model.config.shape[0], *(1,) * (len(model.config.shape) - 3), 8, 8)
    x = torch.randn(1, *shape, generator=generator)
    condition = Condition(
        {
            name: torch.ones(1, *size, dtype=torch.int64)
            if name == "mask"
            else torch.randn(1, *size, generator=generator)
            for name, size in folder.family.widths.items()
        }
    )
    device = model.device
    for t in few.times if few else (1.0, 0.5):
        ours = guide(model.denoiser, x.to(device), t, condition.to(device)).out.raw.cpu()
        theirs = guide(again, x, t, condition).out.raw
        difference = ((ours - theirs).norm() / ours.norm()).item()
        if not difference < TOLERANCE:
            raise UserError(
                f"What was written differs from the student by {difference:.2g} at t = {t:g}; not exported."
            )


# --- adapters ---------------------------------------------------------------------------------------------------------


def _adapter(model: Model) -> tuple[dict[str, Tensor], Lora]:
    view, lora = model.denoiser.backbone, model.config.lora
    if not isinstance(view, AdapterView) or lora is None:
        raise UserError("This student is no adapter (its run had no adapters:); export it to diffusers or merged.")
    if model.config.base is None or not is_pipeline(model.config.base):
        raise UserError(
            f"This adapter sits on {model.config.base}, itself a student, not on a pipeline; export it to diffusers."
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
        if which == "lora_B":  # the scale goes into the weights: readers disagree on where alpha stands
            tensor = tensor * (lora.alpha / lora.rank)
        if layer.startswith("lora_"):
            which = {"lora_A": "lora_down", "lora_B": "lora_up"}[which]
            named[f"{layer}.alpha"] = torch.tensor(float(lora.rank))
        named[f"{layer}.{which}.weight"] = tensor
    write_tensors(named, file, metadata | {"ss_network_dim": str(lora.rank), "ss_network_alpha": str(lora.rank)})


def _peft(lora: Lora) -> dict[str, Any]:
    return {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}


def _check_lora(model: Model, folder: PipelineFolder, file: Path) -> None:
    """Loads the file into the base by diffusers' own loader or, where the pipeline has none, by PEFT."""
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
