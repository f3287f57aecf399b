"""The README of an export: the code that samples it in diffusers, and the settings for ComfyUI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.core.yaml_files import dump_yaml
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.family import Family
from fewstep.models.hub.few_step_scheduler import step_changes
from fewstep.models.hub.manifest import Manifest, expert_name

LORA_FILE = "pytorch_lora_weights.safetensors"
SAMPLES = "samples.png"
ADAPTERS = (ExportFormat.lora, ExportFormat.comfyui)


@dataclass(frozen=True)
class CardContent:
    """What a card has beside the manifest: the run's config and scores as Markdown, tags, the file ``SAMPLES`` with an
    image per prompt, and the hub id under which the export will be found (its folder: ``.``)."""

    text: str = ""
    tags: tuple[str, ...] = ()
    samples: Image.Image | None = None
    prompts: tuple[str, ...] = ()
    at: str = "."


def model_card(manifest: Manifest, family: Family, content: CardContent, license: str | None = None) -> str:
    """The README with the header that the hub reads. The content's text is added without absolute paths."""
    lines = [f"# {manifest.base}, fine-tuned", "", "Sample it like its base model."]
    if manifest.times:
        steps, times = manifest.num_inference_steps, ", ".join(f"{t:.4g}" for t in manifest.times)
        lines = [
            f"# A {steps}-step student of {manifest.base}",
            "",
            f"Sample with `num_inference_steps={steps}` and guidance off (`{_unguided(family)}`): "
            "the defaults of the pipeline's call are those of its base model.",
            f"The times are {times} (1 is noise); the rule between them is `{manifest.rule}`.",
        ]
    if manifest.form in ADAPTERS:
        lines.append("This is an adapter: use it with a scale of 1 on the base model whose hash is in `fewstep.json`.")
    if content.samples is not None:
        shown = "; ".join(f"*{without_paths(prompt)}*" for prompt in content.prompts)
        lines += ["", f"![Samples]({SAMPLES})", "", f"Not selected, one per prompt, row by row: {shown}."]
    if manifest.form is not ExportFormat.comfyui or family.loads_lora:
        where = "In this folder, with diffusers" if content.at == "." else "With diffusers"
        lines += ["", f"{where}:", "", "```python", *code(manifest, family, content.at), "```"]
    if manifest.form is ExportFormat.diffusers and manifest.times:
        call = f'fewstep.load_pipeline("{content.at}")("a photo")'
        lines += ["", f"With fewstep, `{call}` has the student's settings as its defaults."]
    if manifest.form in ADAPTERS and manifest.times:
        lines += ["", *_comfyui(manifest, family)]
    body = "\n".join([*lines, "", without_paths(content.text)]).rstrip() + "\n"
    return f"---\n{dump_yaml(_header(manifest, content.tags, license))}---\n\n{body}"


def _header(manifest: Manifest, tags: tuple[str, ...], license: str | None) -> dict[str, Any]:
    """The metadata of the hub (huggingface.co/docs/hub/model-cards), as far as they are known."""
    known = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video" if len(manifest.shape) == 4 else "text-to-image",
        "base_model": manifest.base if "/" in manifest.base else None,  # a folder's name is none of the hub
        "base_model_relation": "adapter" if manifest.form in ADAPTERS else "finetune",
        "tags": ["fewstep", *["few-step", "distillation"] * bool(manifest.times), *tags],
    }
    if known["base_model"] is None:
        del known["base_model_relation"]
    return {key: value for key, value in known.items() if value is not None}


def license_of(folder: Path) -> str | None:
    """The license in the header of a model's README; None if it names none."""
    file = folder / "README.md"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return None
    header = lines[1 : lines.index("---", 1)]
    found = (line.partition(":")[2].strip().strip("'\"") for line in header if line.startswith("license:"))
    return next(found, None) or None


def without_paths(text: str) -> str:
    """``text`` with each absolute path replaced by its last part."""
    path = r"(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"`,;:|<>()\[\]{}]*[/\\])?([^\s'\"`,;:|<>()\[\]{}/\\]+)[/\\]?"
    return re.sub(rf"(?<![\w.:/\\-]){path}", r"\1", text)


def code(manifest: Manifest, family: Family, at: str = ".") -> list[str]:
    """Python that loads the export from ``at`` and samples it; the last statement is the call of the pipeline."""
    whole = manifest.form is ExportFormat.diffusers
    folder = at if whole else manifest.base
    own = [family.classes[name].__module__ for name in (manifest.pipeline, manifest.network) if name in family.classes]
    pipeline = _class(family, manifest.pipeline if manifest.pipeline in family.classes else "DiffusionPipeline")
    lines = ["import diffusers", *(f"import {module}" for module in dict.fromkeys(own)), ""]
    lines.append(f'pipe = {pipeline}.from_pretrained("{folder}")')
    count = max(1, len(manifest.boundaries))
    call = ['"a photo"']
    if count > 1 and not manifest.second_denoiser(family):
        loading, switch = _experts(manifest, family, count, at)
        lines += loading
    else:
        switch = ""
        if manifest.form in ADAPTERS:
            lines += _adapter(family, at)
        elif not whole:
            lines.append(f'pipe.{family.part} = {_class(family, manifest.network)}.from_pretrained("{at}")')
    if manifest.scheduler and not whole:
        lines.append(f'pipe.scheduler = diffusers.{manifest.scheduler}.from_pretrained("{at}", subfolder="scheduler")')
    if switch:
        native = family.step_callback == "callback_on_step_end"
        lines += [
            f"changes = {step_changes(manifest.times, manifest.experts)}  # after a step, counted from 0",
            "",
            "",
            f"def change({'pipe, step, t, tensors' if native else 'step, t, latents'}):",
            "    if step in changes:",
            f"        {switch}",
            *["    return tensors"] * native,
            "",
            "",
        ]
        call.append(f"{family.step_callback}=change")
    if manifest.times:
        call[1:1] = [f"num_inference_steps={manifest.num_inference_steps}", _unguided(family)]
    output = "frames" if len(manifest.shape) == 4 else "images"
    return [*lines, f"{output[:-1]} = pipe({', '.join(call)}).{output}[0]"]


def _unguided(family: Family) -> str:
    return f"{family.guidance_argument}={family.guidance_off}"


def _class(family: Family, name: str) -> str:
    return f"{family.classes[name].__module__ if name in family.classes else 'diffusers'}.{name}"


def _adapter(family: Family, at: str) -> list[str]:
    if family.loads_lora:
        return [f'pipe.load_lora_weights("{at}")']
    return [
        "from peft import PeftModel",
        "",
        f'pipe.{family.part} = PeftModel.from_pretrained(pipe.{family.part}, "{at}")',
    ]


def _experts(manifest: Manifest, family: Family, count: int, at: str) -> tuple[list[str], str]:
    """The lines that load several experts and activate the first, and the statement that activates that of a step."""
    names = [expert_name(k) for k in range(count)]
    part = f"pipe.{family.part}"
    if manifest.form in (ExportFormat.diffusers, ExportFormat.merged):
        load = f"{_class(family, manifest.network)}.from_pretrained"
        own = [f'{load}("{at}", subfolder="{name}")' for name in names]
        first = part if manifest.form is ExportFormat.diffusers else own[0]
        lines = [f"experts = [{', '.join([first, *own[1:]])}]", f"{part} = experts[0]"]
        return lines, f"{part} = experts[changes[step]]"
    if family.loads_lora:
        lines = [
            f'pipe.load_lora_weights("{at}", weight_name="{name}.safetensors", adapter_name="{name}")' for name in names
        ]
        return [*lines, f'pipe.set_adapters("{names[0]}")'], 'pipe.set_adapters(f"expert_{changes[step] + 1}")'
    places = [f'"{at}", subfolder="{name}", adapter_name="{name}")' for name in names]
    lines = [
        "from peft import PeftModel",
        "",
        f"{part} = PeftModel.from_pretrained({part}, {places[0]}",
        *(f"{part}.load_adapter({place}" for place in places[1:]),
    ]
    return lines, f'{part}.set_adapter(f"expert_{{changes[step] + 1}}")'


def _comfyui(manifest: Manifest, family: Family) -> list[str]:
    sampler = "lcm" if manifest.rule == "renoise" else "euler"
    steps = manifest.num_inference_steps
    settings = f"sampler `{sampler}`, scheduler `simple`, steps {steps}, cfg 1.0"
    if (manifest.scheduler or "").startswith("FlowMatch"):  # a discrete schedule has no shift
        settings = f"the node `{family.comfyui_shift}` with shift {manifest.shift:g}, then {settings}"
    lines = [f"In ComfyUI: load the adapter with strength 1, then {settings}."]
    if len(manifest.boundaries) > 1:
        starts = [manifest.experts.index(k) for k in range(len(manifest.boundaries))]
        parts = ", ".join(
            f"`{expert_name(k)}` from step {low} to {high}"
            for k, (low, high) in enumerate(zip(starts, [*starts[1:], steps], strict=True))
        )
        lines.append(f"Each expert has its own loader and `KSampler (Advanced)`: {parts}.")
    return lines
