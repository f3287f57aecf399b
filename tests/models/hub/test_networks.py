"""Students of pipelines that are other networks than the teacher's: fewer layers, and other checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from exported import absent
from tiny_pipelines import ADAPTERS, STEPS, TINY, called, fill, settings, stable_diffusion

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config import Config
from fewstep.distill.config_files import parse_config
from fewstep.distill.memory import plan_memory
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.trainer import Trainer
from fewstep.models.condition import Condition
from fewstep.models.guidance import UNGUIDED, guide
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import Model, load_model
from fewstep.samplers.ddim import ddim
from fewstep.samplers.predictor import Predictor

Saved = Callable[[str], Path]
CPU = torch.device("cpu")
SMALLER: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": [32, 32]},
    "sd2": {"block_out_channels": [32, 32]},
    "sdxl": {"transformer_layers_per_block": [1, 1]},
    "pixart": {"num_layers": 1},
    "sd3": {"num_layers": 1},
    "flux": {"num_single_layers": 0},
    "flux_schnell": {"num_single_layers": 0},
    "qwen_image": {"num_layers": 1},
    "wan": {"num_layers": 1},
    "wan_5b": {"num_layers": 1},
}


def config(
    teacher: Path, family: str, out: Path, network: dict[str, Any], adapters: Any = None, **objective: Any
) -> Config:
    raw = settings(teacher, family, out, adapters, networks={"small": network})
    raw["stages"][0]["roles"] = {
        "student": {"lr": 1e-3, "init": "small", "ema": 0.5, "full_finetune": adapters is not None},
        "fake": {"lr": 1e-3},
    }
    raw["stages"][0]["objective"] = {"name": "tdm", "steps": 2, **objective}
    return parse_config(raw, "test")


def weights(model: Model) -> dict[str, torch.Tensor]:
    return model.denoiser.backbone.state_dict()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def raw_outputs(trainer: Trainer, *models: Model) -> list[torch.Tensor]:
    """The outputs of models for the same input."""
    x = torch.randn(2, *models[0].config.shape, generator=torch.Generator().manual_seed(0))
    condition = trainer.loop.sources["data"](KeyedRandom(0, 0, "test", 0), 2).condition
    with torch.no_grad():
        return [guide(model.denoiser, x, 0.5, condition).out.raw for model in models]


# --- fewer layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SMALLER))
def test_a_student_with_fewer_layers_trains_and_comes_back(saved: Saved, name: str, tmp_path: Path) -> None:
    settings_of_run = config(saved(name), name, tmp_path / "run", {"backbone": SMALLER[name]})
    run = RunFolder.create(settings_of_run, CPU)
    student, teacher = (run.trainer.roles.denoiser(role).backbone.state_dict() for role in ("student", "teacher"))
    equal = [key for key in student if key in teacher and student[key].shape == teacher[key].shape]
    assert all(torch.equal(student[key], teacher[key]) for key in equal)
    (note,) = run.trainer.inputs.notes
    assert note.startswith(f"networks.small: {len(equal)} of {len(student)} tensors were copied from the teacher")
    assert sum(value.numel() for value in student.values()) < sum(value.numel() for value in teacher.values())
    run.train()
    with run.trainer.roles["student"].averaged():
        trained = copy.deepcopy(run.trainer.student)
    for reloaded in (load_model(tmp_path / "run"), fewstep.load(checkpoints(tmp_path / "run/checkpoints")[-1], "cpu")):
        assert_same(weights(trained), weights(reloaded))
        ours, theirs = raw_outputs(run.trainer, trained, reloaded)
        assert torch.equal(ours, theirs)
    half = load_model(tmp_path / "run", dtype=torch.bfloat16)
    assert {value.dtype for value in weights(half).values() if value.is_floating_point()} >= {torch.bfloat16}


def test_layers_of_the_teacher_are_those_with_its_names(saved: Saved, tmp_path: Path) -> None:
    trainer = Trainer.create(config(saved("wan"), "wan", tmp_path, {"backbone": {"num_layers": 1}}), device="cpu")
    student, teacher = (trainer.roles.denoiser(role).backbone for role in ("student", "teacher"))
    assert (len(student.network.blocks), len(teacher.network.blocks)) == (1, 2)
    assert_same(student.network.blocks[0].state_dict(), teacher.network.blocks[0].state_dict())
    assert student.family.network["num_layers"] == 1, "features and memory follow the network's own settings"


def test_resuming_equals_not_stopping(saved: Saved, tmp_path: Path) -> None:
    whole = config(saved("sd3"), "sd3", tmp_path / "whole", {"backbone": {"num_layers": 1}})
    longer = whole.model_dump()["stages"][0] | {"steps": 4, "objective": whole.stages[0].objective}
    whole = Config.model_validate(whole.model_dump() | {"stages": [longer]})
    fewstep.train(whole, progress=False)
    half = RunFolder.create(whole.model_copy(update={"out": str(tmp_path / "half")}), CPU)
    half.trainer.advance(2)
    half.on_checkpoint(half.trainer)
    RunFolder.reopen(tmp_path / "half", CPU).train()
    assert_same(weights(load_model(tmp_path / "half")), weights(load_model(tmp_path / "whole")))


@pytest.mark.parametrize("name", ["sd", "sd3", "wan"])
@pytest.mark.parametrize("form", [ExportFormat.diffusers, ExportFormat.merged])
def test_a_small_student_is_exported_and_reloaded(
    saved: Saved, name: str, form: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, folder = TINY[name], PipelineFolder(saved(name))
    run = fewstep.train(config(saved(name), name, tmp_path / "run", {"backbone": SMALLER[name]}, steps=STEPS),
                        progress=False)  # fmt: skip
    out = fewstep.export(run, form, tmp_path / "export")
    student = load_model(run)
    monkeypatch.chdir(saved(name).parent)
    exported = load_model(out)
    layers = exported.denoiser.backbone.network.config, student.denoiser.backbone.network.config
    assert all(layers[0][key] == layers[1][key] for key in SMALLER[name])
    assert ("network" in exported.config.backbone) == (form is ExportFormat.merged)
    assert_same(weights(exported), weights(student))
    if form is not ExportFormat.diffusers:
        return
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out, **absent(out))
    pipeline.set_progress_bar_config(disable=True)
    own = getattr(pipeline, folder.family.part)
    assert_same(own.state_dict(), student.denoiser.backbone.network.state_dict())
    embeddings = {tiny.arguments[key]: value for key, value in tiny.embeddings(2, 1).items()}
    noise, theirs = called(tiny, folder, pipeline, folder.family.guidance_off, output_type="latent", **embeddings)
    few = student.config.few_step
    with torch.no_grad():
        predictor = Predictor(student.denoiser, Condition(tiny.embeddings(2, 1)), UNGUIDED)
        ours = ddim(predictor, noise, (*few.times, 0.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --- other checkpoints ------------------------------------------------------------------------------------------------


def other_pipeline(saved: Saved, folder: Path, prediction: str = "epsilon") -> Path:
    """A Stable Diffusion of the same text encoder and VAE with a smaller U-Net."""
    small = stable_diffusion(prediction, widths=(32, 32))
    fill(small.unet, seed=7)
    small.save_pretrained(folder)
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(folder / part)
        shutil.copytree(saved("sd") / part, folder / part)
    return folder


@pytest.mark.parametrize("what", ["pipeline", "network", "run", "adapter"])
def test_a_student_starts_from_another_checkpoint(saved: Saved, what: str, tmp_path: Path) -> None:
    checkpoint = other_pipeline(saved, tmp_path / "other")
    if what == "network":
        checkpoint = checkpoint / "unet"
    if what in ("run", "adapter"):
        pytest.importorskip("peft")
        first = settings(checkpoint, "sd", tmp_path / "first", ADAPTERS if what == "adapter" else None)
        first["data"] = {"kind": "prompts", "path": str(saved("sd") / "prompts")}
        checkpoint = fewstep.train(parse_config(first, "test"), progress=False)
    run = RunFolder.create(config(saved("sd"), "sd", tmp_path / "run", {"checkpoint": str(checkpoint)}), CPU)
    start = copy.deepcopy(run.trainer.student)
    if what == "network":
        origin = diffusers.UNet2DConditionModel.from_pretrained(checkpoint).state_dict()
        assert_same(start.denoiser.backbone.network.state_dict(), origin)
    else:
        ours, theirs = raw_outputs(run.trainer, start, load_model(checkpoint, size=TINY["sd"].size)
                                   if what == "pipeline" else load_model(checkpoint))  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    run.train()
    with run.trainer.roles["student"].averaged():
        trained = copy.deepcopy(run.trainer.student)
    reloaded = load_model(tmp_path / "run")
    assert_same(weights(trained), weights(reloaded))
    ours, theirs = raw_outputs(run.trainer, trained, reloaded)
    assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_prediction_type_keeps_its_own(saved: Saved, tmp_path: Path) -> None:
    checkpoint = other_pipeline(saved, tmp_path / "other", "v_prediction")
    folder = fewstep.train(config(saved("sd"), "sd", tmp_path / "run", {"checkpoint": str(checkpoint)}), progress=False)
    assert load_model(folder).denoiser.kind == load_model(folder).config.prediction == "v"
    assert load_model(saved("sd")).denoiser.kind == "noise"


def test_with_adapters_a_small_student_is_whole_and_the_fake_an_adapter(saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    small = {"backbone": {"num_layers": 1}}
    run = RunFolder.create(config(saved("sd3"), "sd3", tmp_path / "run", small, ADAPTERS), CPU)
    run.train()
    model = load_model(tmp_path / "run")
    assert (model.config.lora, model.config.base) == (None, str(saved("sd3").resolve()))
    with run.trainer.roles["student"].averaged():
        assert_same(run.trainer.generator.backbone.state_dict(), weights(model))


def test_experts_are_a_small_student_and_the_teacher(saved: Saved, tmp_path: Path) -> None:
    small = {"backbone": {"num_layers": 1}}
    run = RunFolder.create(config(saved("sd3"), "sd3", tmp_path / "run", small, name="phased_dmd"), CPU)
    run.train()
    with run.trainer.roles["student"].averaged():
        trained = copy.deepcopy(run.trainer.generator.backbone.state_dict())
    for model in (load_model(tmp_path / "run"), fewstep.load(checkpoints(tmp_path / "run/checkpoints")[-1], "cpu")):
        assert_same(trained, weights(model))
        assert [len(expert.network.transformer_blocks) for expert in model.denoiser.backbone.experts] == [1, 2]
    exported = load_model(fewstep.export(tmp_path / "run", ExportFormat.diffusers, tmp_path / "export"))
    assert_same(weights(exported), trained)


def test_a_small_student_is_the_teacher_of_another_run(saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first = fewstep.train(config(saved("sd3"), "sd3", tmp_path / "first", {"backbone": {"num_layers": 1}}),
                          progress=False)  # fmt: skip
    for name, adapters in (("copies", None), ("adapters", ADAPTERS)):
        raw = settings(first, "sd3", tmp_path / name, adapters)
        raw["data"]["path"] = str(saved("sd3") / "prompts")
        run = RunFolder.create(parse_config(raw, "test"), CPU)
        run.train()
        assert_same(weights(load_model(tmp_path / name)), run.trainer.generator.backbone.state_dict())
        if adapters is None:
            assert plan_memory(run.trainer.config).roles["teacher"].weights == sum(
                value.nbytes for value in weights(load_model(first)).values()
            )


@pytest.mark.parametrize("checkpoint", [False, True])
def test_memory_of_a_small_student_is_planned(saved: Saved, tmp_path: Path, checkpoint: bool) -> None:
    unet = other_pipeline(saved, tmp_path / "other") / "unet"
    network = {"checkpoint": str(unet)} if checkpoint else {"backbone": SMALLER["sd"]}
    settings_of_run = config(saved("sd"), "sd", tmp_path / "run", network)
    plan, trainer = plan_memory(settings_of_run), Trainer.create(settings_of_run, device="cpu")
    for name in ("teacher", "student", "fake"):
        assert plan.roles[name].weights == sum(p.nbytes for p in trainer.roles.denoiser(name).parameters())
    assert plan.roles["student"].weights < plan.roles["fake"].weights
    published = {"teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5", "size": None, "data": {"kind": "labels"}}
    smaller = settings_of_run.model_dump() | published | {"networks": {"small": {"backbone": {"layers_per_block": 1}}}}
    smaller["stages"][0]["objective"] = settings_of_run.stages[0].objective
    small = plan_memory(Config.model_validate(smaller))
    assert small.roles["student"].weights < 0.8 * small.roles["fake"].weights


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"num_layer": 1}, "A SD3Transformer2DModel has no setting 'num_layer'; did you mean 'num_layers'"),
        ({"num_layers": "many"}, "No SD3Transformer2DModel can be built from these settings"),
        ({"name": "unet"}, r"backbone\.name = 'unet': a student of a diffusers pipeline has a network of its class"),
        ({"in_channels": 8, "out_channels": 8}, r"its latent shape: \[8, 8, 8\], the teacher's: \[4, 8, 8\]"),
        ({"joint_attention_dim": 16}, "its shapes of conditions: .*16.*32"),
    ],
)
def test_networks_of_other_latents_or_conditions_are_refused(
    saved: Saved, backbone: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"networks\.small: " + message):
        Trainer.create(config(saved("sd3"), "sd3", tmp_path, {"backbone": backbone}), device="cpu")


def test_checkpoints_of_other_pipelines_are_refused(saved: Saved, tmp_path: Path) -> None:
    def refused(message: str, checkpoint: Path | str, teacher: str = "sd") -> None:
        with pytest.raises(UserError, match=r"networks\.small: " + message):
            Trainer.create(config(saved(teacher), teacher, tmp_path, {"checkpoint": str(checkpoint)}), device="cpu")

    refused("its family: StableDiffusion3, the teacher's: StableDiffusion", saved("sd3"))
    refused("its condition: class labels, the teacher's: prompts", "fashion")
    refused("/.*transformer holds a SD3Transformer2DModel, the teacher's pipeline needs a UNet2DConditionModel",
            saved("sd3") / "transformer")  # fmt: skip
    refused(r"the pipeline .* has two denoisers", saved("wan") / "transformer", "wan_2_2")
    refused("it has several experts", saved("wan_2_2"), "wan")
    other = other_pipeline(saved, tmp_path / "other")
    (other / "tokenizer" / "extra.json").write_text("{}")
    refused("its text encoders have other files than the teacher's", other)
    vae = other / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 0.5}))
    refused("its scaling_factor of the VAE: 0.5, the teacher's: 0.18215", other)
    raw = settings(Path("fashion"), "sd", tmp_path, None, networks={"small": {"checkpoint": str(other / "unet")}})
    raw["stages"][0]["roles"]["student"] = {"lr": 1e-3, "init": "small"}
    native = parse_config(raw | {"teacher": "fashion", "size": None, "data": {}}, "test")
    with pytest.raises(UserError, match="is a network of diffusers, and the teacher is not a diffusers pipeline"):
        Trainer.create(native, device="cpu")
