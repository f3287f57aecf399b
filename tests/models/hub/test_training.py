"""Training on diffusers teachers: every family, as copies and as adapters, saved and reloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import ADAPTERS, TINY, settings, stable_diffusion, write_embeddings

import fewstep
from fewstep.api.bench_cost import bench_memory
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder
from fewstep.models.adapters import AdapterView
from fewstep.models.guidance import guide
from fewstep.models.hub.encoded import read_index
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model

pytest.importorskip("peft")
Saved = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("name", list(TINY))
def test_a_family_trains_and_its_student_comes_back(
    saved: Saved, name: str, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    config = parse_config(settings(saved(name), name, tmp_path / "run", adapters), "test")
    run = RunFolder.create(config, CPU)
    before = {key: value.clone() for key, value in run.trainer.roles.denoiser("teacher").state_dict().items()}
    run.train()
    after = run.trainer.roles.denoiser("teacher").state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the teacher changed"
    student = load_model(tmp_path / "run" / "student")
    assert isinstance(student.denoiser.backbone, AdapterView) == bool(adapters)
    trained, reloaded = run.trainer.generator.backbone.state_dict(), student.denoiser.backbone.state_dict()
    assert trained.keys() == reloaded.keys()
    assert all(torch.equal(trained[key], value) for key, value in reloaded.items())
    with torch.no_grad():
        x = torch.randn(2, *student.config.shape, generator=torch.Generator().manual_seed(0))
        condition = run.trainer.loop.sources["data"](KeyedRandom(0, 0, "test", 0), 2).condition
        denoisers = (run.trainer.generator, student.denoiser, run.trainer.roles.denoiser("teacher"))
        ours, theirs, teacher = (guide(denoiser, x, 0.5, condition).out.raw for denoiser in denoisers)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, teacher)
    if adapters:
        assert all(".lora_" in key for key in read_tensors(tmp_path / "run" / "student" / "model.safetensors"))


@pytest.mark.parametrize("full", ["student", "fake"])
def test_one_role_may_be_a_copy_and_another_an_adapter(saved: Saved, full: str, tmp_path: Path) -> None:
    raw = settings(saved("sd"), "sd", tmp_path / "run", ADAPTERS)
    raw["stages"][0]["roles"] = {role: {"lr": 1e-3, "full_finetune": role == full} for role in ("student", "fake")}
    run = RunFolder.create(parse_config(raw, "test"), CPU)
    kinds = {role: isinstance(run.trainer.roles.denoiser(role).backbone, AdapterView) for role in ("student", "fake")}
    assert kinds == {"student": full != "student", "fake": full != "fake"}
    run.train()
    student = load_model(tmp_path / "run" / "student")
    assert isinstance(student.denoiser.backbone, AdapterView) == kinds["student"]
    trained, reloaded = run.trainer.generator.backbone.state_dict(), student.denoiser.backbone.state_dict()
    assert all(torch.equal(trained[key], value) for key, value in reloaded.items())
    reopened = RunFolder.reopen(tmp_path / "run", CPU).trainer.generator.backbone.state_dict()
    assert all(torch.equal(trained[key], value) for key, value in reopened.items())


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_a_merged_adapter_computes_the_same(saved: Saved, name: str, tmp_path: Path) -> None:
    config = parse_config(settings(saved(name), name, tmp_path / "run", ADAPTERS), "test")
    run = RunFolder.create(config, CPU)
    run.train()
    view = run.trainer.roles.denoiser("student").backbone
    assert isinstance(view, AdapterView)
    x = torch.randn(2, *run.trainer.inputs.model_config.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    condition = run.trainer.loop.sources["data"](KeyedRandom(0, 0, "test", 0), 2).condition
    condition = condition.replace(guidance=torch.ones(2))
    merged = view.merged()
    assert not [key for key in merged.state_dict() if "lora" in key]
    with torch.no_grad():
        torch.testing.assert_close(merged(x, t, condition), view(x, t, condition), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
def test_stopping_and_resuming_equals_not_stopping(
    saved: Saved, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    raw = settings(saved("sd3"), "sd3", tmp_path / "whole", adapters, checkpoint={"every": 1})
    raw["stages"][0]["steps"] = 4
    whole = fewstep.train(parse_config(raw, "test"))
    half = RunFolder.create(parse_config(raw | {"out": str(tmp_path / "half")}, "test"), CPU)
    half.trainer.advance(2)
    half.on_checkpoint(half.trainer)
    RunFolder.reopen(tmp_path / "half", CPU).train()
    a, b = (read_tensors(run / "student" / "model.safetensors") for run in (whole, tmp_path / "half"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_student_with_an_adapter_can_be_the_teacher_of_another_run(saved: Saved, tmp_path: Path) -> None:
    """8 -> 4 -> 2: the adapter of the first student is merged into the base of the second."""
    first = fewstep.train(parse_config(settings(saved("sd"), "sd", tmp_path / "first", ADAPTERS), "test"))
    again = settings(first / "student", "sd", tmp_path / "second", ADAPTERS)
    again |= {"data": {"kind": "prompts", "path": str(saved("sd") / "prompts")}}
    second = fewstep.train(parse_config(again, "test"))
    student = load_model(second / "student")
    assert student.config.base == str(first / "student")
    assert isinstance(student.denoiser.backbone, AdapterView)


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
def test_stages_may_halve_the_number_of_steps(saved: Saved, adapters: dict[str, Any] | None, tmp_path: Path) -> None:
    """8 -> 4 -> 2 as stages of one config: student and fake continue, the teacher stays the same."""
    raw = settings(saved("sd"), "sd", tmp_path / "run", adapters)
    keep = {"init": "keep", "lr": 1e-3}
    raw["stages"] = [
        {"steps": 1, "objective": {"name": "tdm", "steps": 8}, "roles": raw["stages"][0]["roles"]},
        *(
            {"steps": 1, "objective": {"name": "tdm", "steps": steps}, "roles": {"student": keep, "fake": keep}}
            for steps in (4, 2)
        ),
    ]  # fmt: skip
    student = load_model(fewstep.train(parse_config(raw, "test")) / "student")
    assert student.config.few_step is not None
    assert student.config.few_step.times == (1.0, 0.5)


@pytest.mark.parametrize("name", list(TINY))
def test_a_discriminator_trains_on_the_feature_layers_of_every_family(saved: Saved, name: str, tmp_path: Path) -> None:
    raw = settings(saved(name), name, tmp_path / "run", None)
    raw["stages"][0]["objective"] = {"name": "dmd2", "steps": 2, "critic_updates": 1, "gan": {}}
    raw["stages"][0]["roles"]["discriminator"] = {"init": "new", "lr": 1e-3}
    folder, tiny = tmp_path / "captioned", TINY[name]
    shutil.copytree(saved(name) / "prompts", folder)
    latents = torch.randn(6, *PipelineFolder.open(saved(name)).family.shape(*tiny.size))
    write_tensors({"x0": latents, "prompt": torch.arange(6)}, folder / "images-00000.safetensors")
    index = read_index(folder).model_copy(update={"images": 6})
    (folder / "index.json").write_text(index.model_dump_json())
    raw["data"]["path"] = str(folder)
    run = fewstep.train(parse_config(raw, "test"))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss/discriminator"] > 0


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("name", list(TINY))
def test_recomputing_activations_changes_no_gradient(
    saved: Saved, name: str, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    """With it, too, only the trained adapters or copies get gradients."""
    gradients = []
    for checkpointing in (False, True):
        raw = settings(saved(name), name, tmp_path / str(checkpointing), adapters)
        run = RunFolder.create(parse_config(raw | {"gradient_checkpointing": checkpointing}, "test"), CPU)
        run.trainer.loop.update(run.trainer.objective.updates[0], 0, {0: {}})
        gradients.append({key: p.grad for key, p in run.trainer.generator.named_parameters() if p.grad is not None})
        assert all(p.grad is None for role in ("teacher", "fake") for p in run.trainer.roles[role].parameters)
        if adapters:
            network = run.trainer.roles.denoiser("teacher").backbone.shared_network
            reached = [key for key, p in network.named_parameters() if p.grad is not None]
            assert reached
            assert all(".lora_" in key for key in reached)
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert plain
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-4, atol=1e-7)


def test_a_run_with_adapters_has_one_base_and_a_quarter_of_the_peak_memory(tmp_path: Path) -> None:
    """A U-Net of 44 M parameters on tiny latents, so that weights dominate the memory."""
    pipeline = stable_diffusion(widths=(256, 512))
    folder = tmp_path / "wide"
    pipeline.save_pretrained(folder)
    write_embeddings("sd", folder)
    config = parse_config(settings(folder, "sd", tmp_path / "run", {"rank": 4}), "test")
    result = bench_memory(config)
    base = 4 * sum(p.numel() for p in pipeline.unet.parameters())
    assert base < result["adapters"]["parameters"] < 1.05 * base
    assert result["copies"]["parameters"] == 3 * base
    assert result["peak_ratio"] < 0.25


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_training_writes_images_of_prompts(saved: Saved, name: str, tmp_path: Path) -> None:
    shown = {"validation": {"every": 1, "images": 3}, "previews": {"n": 2}}
    raw = settings(saved(name), name, tmp_path / "run", ADAPTERS, **shown)
    run = fewstep.train(parse_config(raw, "test"))
    assert [file.name for file in sorted((run / "samples").iterdir())] == ["step-0000001.png", "step-0000002.png"]
    height, width, frames = TINY[name].size
    with Image.open(run / "samples" / "step-0000002.png") as image:
        across, down = (3, 1) if frames == 1 else (frames, 3)
        assert image.size == (across * width + across - 1, down * height + down - 1)
    assert [file.name for file in sorted((run / "previews").iterdir())] == ["step-0000001.png", "step-0000002.png"]
    with Image.open(run / "previews" / "step-0000002.png") as image:  # of videos three frames
        assert image.height == 2 * (20 + 64 // width * height) + 6
        assert image.width >= 2 * (1 if frames == 1 else 3) * 64
    assert (run / "student" / "model.safetensors").is_file()


DATA_FREE = {
    "dmd": {"regression": 0.0},
    "dmd2": {"steps": 2},
    "decoupled_dmd": {"steps": 2},
    "phased_dmd": {"steps": 2},
    "cdm": {"max_steps": 2, "blend": 0.0},  # which adapters refuse
    "tdm": {"steps": 2, "critic": "importance"},
}


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("objective", list(DATA_FREE))
def test_every_data_free_objective_trains_a_pipeline(
    saved: Saved, objective: str, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    raw = settings(saved("sd"), "sd", tmp_path / "run", adapters)
    raw["stages"][0]["objective"] = {"name": objective, "critic_updates": 1, "guidance": 2.0, **DATA_FREE[objective]}
    run = fewstep.train(parse_config(raw, "test"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in lines)
    assert fewstep.sample(run, prompts=["a cat"], device="cpu").shape == (1, 3, 16, 16)


def test_a_pipeline_needs_prompts_and_prompts_need_a_pipeline(saved: Saved, tmp_path: Path) -> None:
    raw = settings(saved("sd"), "sd", tmp_path / "run", None)
    with pytest.raises(UserError, match="needs prompts"):
        fewstep.train(parse_config(raw | {"data": {"kind": "labels"}}, "test"))
    with pytest.raises(UserError, match="takes class labels"):
        fewstep.train(parse_config(raw | {"teacher": "fashion", "size": None}, "test"))
