"""``fewstep.load_pipeline``: the plain call of an exported pipeline is the student."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import absent, embedded, student_samples
from tiny_pipelines import STEPS, TINY, difference, inputs

import fewstep
from fewstep.core.errors import UserError
from fewstep.models.hub.export import export
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model

pytest.importorskip("peft")
Saved = Callable[[str], Path]
Runs = Callable[..., Path]


def loaded(out: Path) -> Any:
    pipeline = fewstep.load_pipeline(out, **absent(out))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TWO_EXPERTS = [(name, 2) for name in ("sdxl", "pixart", "flux", "wan")]


@pytest.mark.parametrize(("name", "experts"), [*((name, 1) for name in TINY), *TWO_EXPERTS])
def test_the_plain_call_is_the_student(runs: Runs, saved: Saved, name: str, experts: int, tmp_path: Path) -> None:
    run, folder = runs(name, experts=experts), PipelineFolder.open(saved(name))
    pipeline = loaded(fewstep.export(run, ExportFormat.diffusers, tmp_path / "out"))
    for _ in range(2):  # the second call must start with the first expert again
        noise, arguments = inputs(TINY[name], folder, pipeline)
        latents = pipeline(**arguments, output_type="latent", **embedded(TINY[name], pipeline))[0]
        ours = student_samples(run / "student", TINY[name], pipeline, noise)
        assert difference(ours, torch.as_tensor(latents)) < 3e-6  # another expert changes some by 8e-6


def test_an_export_with_weights_in_a_pickle_is_not_opened(runs: Runs, tmp_path: Path) -> None:
    out = fewstep.export(runs("sd"), ExportFormat.diffusers, tmp_path / "out")
    (weights,) = (out / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"unet are a pickle .*which can run code"):
        fewstep.load_pipeline(out, **absent(out))


def test_diffusers_itself_has_other_defaults_that_no_file_changes(runs: Runs, tmp_path: Path) -> None:
    """If this fails, a version of diffusers has found a way, and ``load_pipeline`` may go."""
    import diffusers

    out = fewstep.export(runs("sd"), ExportFormat.diffusers, tmp_path / "out")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        file = out / name
        content = json.loads(file.read_text()) | {"num_inference_steps": STEPS, "guidance_scale": 1.0}
        file.write_text(json.dumps(content))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out, **absent(out))
    pipeline.set_progress_bar_config(disable=True)
    steps: list[int] = []
    seen = inspect.signature(type(pipeline).__call__).parameters
    noise = torch.zeros(1, 4, 8, 8)
    embeddings = {name: torch.zeros(1, 5, TINY["sd"].tensors["prompt"][1]) for name in ("prompt_embeds",)}
    pipeline(
        latents=noise, output_type="latent", negative_prompt_embeds=embeddings["prompt_embeds"], **embeddings,
        callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step) or tensors,
    )  # fmt: skip
    assert len(steps) == seen["num_inference_steps"].default == 50
    assert seen["guidance_scale"].default == pipeline.guidance_scale == 7.5


def test_given_arguments_win(runs: Runs, saved: Saved, tmp_path: Path) -> None:
    pipeline = loaded(fewstep.export(runs("sd"), ExportFormat.diffusers, tmp_path / "out"))
    _, arguments = inputs(TINY["sd"], PipelineFolder.open(saved("sd")), pipeline)
    arguments |= {"output_type": "latent"} | embedded(TINY["sd"], pipeline)
    height, width = arguments.pop("height"), arguments.pop("width")
    pipeline(None, height, width, 2, **arguments)  # by position
    assert len(pipeline.scheduler.timesteps) == 2
    pipeline(
        height=height, width=width, guidance_scale=3.0, negative_prompt_embeds=arguments["prompt_embeds"], **arguments
    )
    assert pipeline.guidance_scale == 3.0
    assert len(pipeline.scheduler.timesteps) == STEPS


def test_the_pipeline_keeps_its_class_name_when_it_is_saved(runs: Runs, tmp_path: Path) -> None:
    pipeline = loaded(fewstep.export(runs("sd"), ExportFormat.diffusers, tmp_path / "out"))
    pipeline.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_experts_have_steps_of_their_own(runs: Runs, tmp_path: Path) -> None:
    pipeline = loaded(fewstep.export(runs("sdxl", experts=2), ExportFormat.diffusers, tmp_path / "out"))
    for arguments in ({"num_inference_steps": 8}, {"callback_on_step_end": print}):
        with pytest.raises(
            UserError, match=f"between experts after steps of its own: leave out {next(iter(arguments))}"
        ):
            pipeline("a photo", **arguments)


def test_a_pipeline_that_is_no_student_keeps_its_defaults(saved: Saved, tmp_path: Path) -> None:
    pipeline = loaded(export(load_model(saved("sd")), ExportFormat.diffusers, tmp_path / "out"))
    noise = torch.zeros(1, 4, 8, 8)
    prompt = torch.zeros(1, 5, TINY["sd"].tensors["prompt"][1])
    pipeline(latents=noise, prompt_embeds=prompt, negative_prompt_embeds=prompt, output_type="latent")
    assert len(pipeline.scheduler.timesteps) == 50


def test_other_folders_are_refused(runs: Runs, saved: Saved, tmp_path: Path) -> None:
    lora = fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "lora")
    for folder in (lora, saved("sd"), tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not an exported pipeline"):
            fewstep.load_pipeline(folder)
