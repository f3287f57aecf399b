"""Exports of students, loaded as a user would load them: by diffusers' own classes and calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from exported import absent
from tiny_pipelines import ADAPTERS, STEPS, TINY, called, difference, packed, settings

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_metadata, read_tensors
from fewstep.distill.config_files import parse_config
from fewstep.models.condition import Condition
from fewstep.models.guidance import UNGUIDED
from fewstep.models.hub import export as module
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.sd import StableDiffusion
from fewstep.models.loading import load_model, pipeline_of
from fewstep.samplers.ddim import ddim
from fewstep.samplers.predictor import Predictor

pytest.importorskip("peft")
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a run, once per setting, and returns its folder."""
    folders: dict[Any, Path] = {}

    def train(family: str, adapters: dict[str, Any] | None = ADAPTERS, name: str = "tdm", **objective: Any) -> Path:
        key = family, str(adapters), name, tuple(objective.items())
        if key not in folders:
            raw = settings(saved(family), family, tmp_path_factory.mktemp("run") / "run", adapters)
            raw["stages"][0]["objective"] = {"name": name, "steps": STEPS, **objective}
            folders[key] = fewstep.train(parse_config(raw, "test"))
        return folders[key]

    return train


def ours(name: str, run: Path, noise: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    """The student's samples from this noise."""
    model = load_model(run / "student")
    few = model.config.few_step
    assert few is not None
    with torch.no_grad():
        return ddim(Predictor(model.denoiser, Condition(cond), UNGUIDED), noise, (*few.times, 0.0))


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("name", list(TINY))
def test_the_exported_pipelines_default_call_samples_as_the_student(
    runs: Callable[..., Path], name: str, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Only the number of steps and guidance off are passed, as the model card describes."""
    run, tiny = runs(name, adapters), TINY[name]
    out = fewstep.export(run, ExportFormat.diffusers, tmp_path / "out")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out, **absent(out))
    pipeline.set_progress_bar_config(disable=True)
    cond = tiny.embeddings(2, 1)
    arguments = {tiny.arguments[key]: value for key, value in cond.items()}
    if type(pipeline).__name__.startswith("PixArt"):
        arguments["negative_prompt"] = None
    folder = PipelineFolder.open(out)
    noise, theirs = called(tiny, folder, pipeline, 1.0, output_type="latent", **arguments)
    assert difference(packed(pipeline, ours(name, run, noise, cond)), theirs) < 1e-4
    manifest = json.loads((out / "fewstep.json").read_text())
    assert manifest["num_inference_steps"] == STEPS
    card = (out / "README.md").read_text()
    assert f"num_inference_steps={STEPS}" in card
    assert "name: tdm" in card


@pytest.mark.parametrize("name", ["flux", "qwen_image", "sd3", "wan"])
def test_shifted_times_are_those_of_the_default_call(runs: Callable[..., Path], name: str, tmp_path: Path) -> None:
    run, tiny = runs(name, shift=3.0), TINY[name]
    folder = PipelineFolder.open(fewstep.export(run, ExportFormat.diffusers, tmp_path / "out"))
    pipeline = folder.pipeline(folder.denoiser().backbone.network)
    pipeline.set_progress_bar_config(disable=True)
    cond = tiny.embeddings(2, 1)
    noise, theirs = called(
        tiny, folder, pipeline, 1.0, output_type="latent", **{tiny.arguments[k]: v for k, v in cond.items()}
    )
    assert difference(packed(pipeline, ours(name, run, noise, cond)), theirs) < 1e-4


@pytest.mark.parametrize("form", [ExportFormat.lora, ExportFormat.comfyui, ExportFormat.merged])
@pytest.mark.parametrize("name", [name for name in TINY if name != "wan_2_2"])
def test_exported_adapters_and_networks_pass_their_check(
    runs: Callable[..., Path], saved: Saved, name: str, form: ExportFormat, tmp_path: Path
) -> None:
    run = runs(name, {"rank": 2, "alpha": 6.0})
    out = fewstep.export(run, form, tmp_path / "out")
    if form is ExportFormat.merged:
        assert (out / "config.json").is_file()
        return
    [file] = out.glob("*.safetensors")
    trained, written = (read_tensors(path) for path in (run / "student" / "model.safetensors", file))
    assert _norms(written, "lora_A", "lora_down") == pytest.approx(_norms(trained, "lora_A"))
    scaled = [3 * norm for norm in _norms(trained, "lora_B")]
    assert _norms(written, "lora_B", "lora_up") == pytest.approx(scaled), "alpha / rank is in the factors"
    assert all(tensor == 2 for name, tensor in written.items() if name.endswith(".alpha"))
    metadata = read_metadata(file)
    assert json.loads(metadata["num_inference_steps"]) == STEPS
    assert json.loads(metadata["times"]) == [1.0, 0.75, 0.5, 0.25]
    assert len(metadata["base_sha256"]) == 64
    assert metadata["lora_scale"] == "1.0"


def _norms(tensors: dict[str, torch.Tensor], *factors: str) -> list[float]:
    return sorted(t.norm().item() for name, t in tensors.items() if any(factor in name for factor in factors))


def test_the_keys_of_pixart_are_those_of_comfyui(runs: Callable[..., Path], tmp_path: Path) -> None:
    """ComfyUI maps ``transformer.`` and diffusers' path to its own network (comfy/lora.py)."""
    out = fewstep.export(runs("pixart"), ExportFormat.comfyui, tmp_path / "out")
    names = read_tensors(out / "pytorch_lora_weights.safetensors")
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    assert all(re.fullmatch(r"transformer\.transformer_blocks\..*\.lora_[AB]\.weight", name) for name in names)


def test_guidance_is_off_where_the_pipeline_says(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Z-Image's pipeline at 0, where a scale of 1 would be guided."""
    monkeypatch.setattr(StableDiffusion, "guidance_off", 0.0)
    out = fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out")
    assert json.loads((out / "fewstep.json").read_text())["guidance_scale"] == 0.0
    card = (out / "README.md").read_text()
    assert "guidance off (`guidance_scale=0.0`)" in card
    assert 'pipe("a photo", num_inference_steps=4, guidance_scale=0.0)' in card


def test_a_renoising_student_with_a_discrete_schedule_gets_the_lcm_scheduler(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    run = runs("sd", name="dmd2")
    out = fewstep.export(run, ExportFormat.diffusers, tmp_path / "out")
    scheduler = diffusers.LCMScheduler.from_pretrained(out / "scheduler")
    for steps, timesteps in ((4, [999, 749, 499, 249]), (2, [999, 499]), (1, [999])):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps


def test_a_model_that_is_not_a_student_keeps_the_scheduler_of_its_pipeline(saved: Saved, tmp_path: Path) -> None:
    out = module.export(load_model(saved("sd2")), ExportFormat.diffusers, tmp_path / "out")
    assert load_model(out).config.prediction == "v"
    assert str(saved("sd2")) not in (out / "unet" / "config.json").read_text(), "no local path is exported"
    assert "times" not in json.loads((out / "fewstep.json").read_text())
    assert "Sample it like its base model" in (out / "README.md").read_text()


def test_exports_that_are_not_possible_give_the_reason(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is not an adapter"):
        fewstep.export(runs("sd", None), ExportFormat.lora, tmp_path / "b")
    with pytest.raises(UserError, match="between two timesteps"):
        fewstep.export(runs("sd", steps=3), ExportFormat.lora, tmp_path / "c")
    for form in (ExportFormat.lora, ExportFormat.merged, ExportFormat.comfyui):
        with pytest.raises(UserError, match="has two denoisers, and a student of it is exported to diffusers only"):
            fewstep.export(runs("wan_2_2"), form, tmp_path / "e")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "full")
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from the student"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"], "no partial export is left"


def test_a_full_disk_leaves_no_partial_export(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copytree", full)
    with pytest.raises(UserError, match="No space left"):
        fewstep.export(runs("sd"), ExportFormat.diffusers, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(runs: Callable[..., Path], saved: Saved, tmp_path: Path) -> None:
    student = runs("sd") / "student"
    config = json.loads((student / "config.json").read_text())
    other = tmp_path / "student"
    other.mkdir()
    (other / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes())
    for content, message in (
        (config, "trained on other weights"),
        ({key: value for key, value in config.items() if key != "base_sha256"}, "does not belong to this network"),
    ):
        (other / "config.json").write_text(json.dumps(content | {"base": str(saved("sdxl"))}))
        with pytest.raises(UserError, match=message):
            load_model(other)
    assert pipeline_of(load_model(student)).path == saved("sd").resolve()
