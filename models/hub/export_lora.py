"""Writing adapters for diffusers' ``load_lora_weights``, PEFT and ComfyUI, and loading them back as these do.

The scale alpha / rank is multiplied into the factors: programs disagree about where alpha is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.card import LORA_FILE
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.family import Family, HubBackbone
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.manifest import expert_name
from fewstep.models.loading import Model, is_pipeline
from fewstep.models.model_config import Lora

PEFT_FILE, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."


def adapters_of(model: Model, experts: list[nn.Module]) -> tuple[list[dict[str, Tensor]], Lora]:
    """The factors of each expert, with the scale in B, and the adapter's settings. An expert that is the teacher itself
    gets zeros. Raises ``UserError`` if the student has no adapter, or if its base is not a pipeline."""
    lora, base = model.config.lora, model.config.base
    views = [expert for expert in experts if isinstance(expert, AdapterView)]
    if lora is None or len(views) < len(experts):
        raise UserError("This student is not an adapter (no adapters: in its config); export to diffusers or merged.")
    if base is None or not is_pipeline(base):
        raise UserError(f"The base of this adapter, {base}, is not a pipeline but a student; export it to diffusers.")
    states = [
        {
            name.removeprefix("network."): tensor * (lora.alpha / lora.rank if ".lora_B." in name else 1.0)
            for name, tensor in view.state_dict().items()
        }
        for view in views
    ]
    zero = {name: torch.zeros_like(tensor) for state in states for name, tensor in state.items()}
    return [state or zero for state in states], lora


def write_adapter(
    tensors: Mapping[str, Tensor], lora: Lora, family: Family, form: ExportFormat, out: Path, number: int,
    several: bool, metadata: dict[str, str],
) -> None:  # fmt: skip
    """Writes the adapter of an expert to ``out``; the names of its files contain ``number`` if there are several."""
    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": list(lora.targets)}
    file = out / (f"{expert_name(number)}.safetensors" if several else LORA_FILE)
    if form is ExportFormat.comfyui:
        write_tensors(_comfyui(tensors, lora.rank, family), file, metadata)
    elif family.loads_lora:
        own = json.dumps({f"{family.part}.{key}": value for key, value in settings.items()})
        named = {f"{family.part}.{name}": tensor for name, tensor in tensors.items()}
        write_tensors(named, file, metadata | {"lora_adapter_metadata": own})
    else:
        from peft import LoraConfig

        folder = out / expert_name(number) if several else out
        write_tensors({PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}, folder / PEFT_FILE, metadata)
        LoraConfig(**settings).save_pretrained(str(folder))


def _comfyui(tensors: Mapping[str, Tensor], rank: int, family: Family) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, factor = name.removesuffix(".weight").rpartition(".")
        layer = family.comfyui(path)
        if layer.startswith("lora_"):  # kohya's format, in which alpha = rank is a scale of 1
            factor = {"lora_A": "lora_down", "lora_B": "lora_up"}[factor]
            named[f"{layer}.alpha"] = torch.tensor(float(rank))
        named[f"{layer}.{factor}.weight"] = tensor
    return named


def load_adapter(
    folder: PipelineFolder, form: ExportFormat, out: Path, number: int, several: bool, dtype: torch.dtype
) -> Denoiser:
    """The base, with weights of ``dtype``, and an expert's adapter, loaded as the model card describes."""
    denoiser = folder.denoiser(dtype)
    assert isinstance(denoiser.backbone, HubBackbone)
    network: Any = denoiser.backbone.network
    file = out / (f"{expert_name(number)}.safetensors" if several else LORA_FILE)
    if folder.family.loads_lora:
        folder.bare(network).load_lora_weights(out, weight_name=file.name)
    elif form is ExportFormat.lora:
        from peft import PeftModel

        PeftModel.from_pretrained(network, str(out / expert_name(number) if several else out))  # changes its layers
    else:  # the keys of ComfyUI, which maps them to its own network
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        tensors = {name.removeprefix(f"{folder.family.part}."): t for name, t in read_tensors(file).items()}
        layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
        rank = next(len(t) for name, t in tensors.items() if ".lora_A." in name)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)
        set_peft_model_state_dict(network, tensors)
    return denoiser


def check_factors(tensors: Mapping[str, Tensor], loaded: Denoiser) -> None:
    """Raises ``UserError`` if the adapter in a network is not the one with these factors, rounded to the type in which
    the program that loaded it keeps them: their outputs differ by rounding too, which would hide a small error."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert isinstance(loaded.backbone, HubBackbone)
    found: dict[str, Tensor] = {}
    modules = loaded.backbone.network.named_modules()
    layers: dict[str, Any] = {path: module for path, module in modules if isinstance(module, BaseTunerLayer)}
    for path, layer in layers.items():
        [name] = layer.active_adapters
        found[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
        found[f"{path}.lora_B.weight"] = layer.lora_B[name].weight * layer.scaling[name]
    wrong = sorted(
        name
        for name in found.keys() | tensors.keys()
        if name not in found or name not in tensors or not found[name].equal(tensors[name].to(found[name]))
    )
    if wrong:
        raise UserError(f"Not exported: the adapter differs from the student's in {wrong[0]} when it is loaded.")
