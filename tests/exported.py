"""Running the code on the card of an export, as a user would, with local folders and random embeddings."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import STEPS, Tiny, called, packed
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.guidance import UNGUIDED
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model
from fewstep.samplers.ddim import ddim
from fewstep.samplers.predictor import Predictor

ADAPTERS = {"rank": 2, "alpha": 6.0}


def absent(folder: Path) -> dict[str, None]:
    """The components that a tiny pipeline does not have, which its loader must be told."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}


def card_code(out: Path) -> str:
    return (out / "README.md").read_text().split("```python\n")[1].split("```")[0]


def run_card(out: Path, base: Path) -> tuple[Any, dict[str, Any]]:
    """The pipeline that the code on the card loads, and the arguments of its call. The current folder must be ``out``;
    the base is found under its name."""
    tree = ast.parse(card_code(out).replace(f'"{base.name}"', repr(str(base))))
    *setup, last = tree.body
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    load = next(call for call in calls if ast.unparse(call.func) == "diffusers.DiffusionPipeline.from_pretrained")
    load.keywords = [ast.keyword(name, ast.Constant(None)) for name in absent(base)]
    found: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(ast.Module(setup, [])), str(out), "exec"), found)
    call = next(node for node in ast.walk(last) if isinstance(node, ast.Call))
    assert ast.unparse(call.func) == "pipe"
    found["pipe"].set_progress_bar_config(disable=True)
    arguments = {
        word.arg: eval(compile(ast.Expression(word.value), "card", "eval"), found) for word in call.keywords if word.arg
    }
    return found["pipe"], arguments


def card_samples(tiny: Tiny, folder: PipelineFolder, pipeline: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Initial noise and latents of the call on the card."""
    given = dict(arguments)
    assert given.pop("num_inference_steps") == STEPS
    scale = given.pop(tiny.scale if tiny.scale in given else "guidance_scale")
    return called(tiny, folder, pipeline, scale, output_type="latent", **embedded(tiny, pipeline), **given)


def embedded(tiny: Tiny, pipeline: Any) -> dict[str, Any]:
    """Random embeddings as arguments of a pipeline's call, instead of a prompt."""
    embeddings: dict[str, Any] = {tiny.arguments[key]: value for key, value in tiny.embeddings(2, 1).items()}
    return embeddings | ({"negative_prompt": None} if type(pipeline).__name__.startswith("PixArt") else {})


def student_samples(student: Path, tiny: Tiny, pipeline: Any, noise: Tensor) -> Tensor:
    """The student's samples from the same noise, in the pipeline's layout."""
    model = load_model(student)
    few = model.config.few_step
    assert few is not None
    with torch.no_grad():
        samples = ddim(Predictor(model.denoiser, Condition(tiny.embeddings(2, 1)), UNGUIDED), noise, (*few.times, 0.0))
    return packed(pipeline, samples)
