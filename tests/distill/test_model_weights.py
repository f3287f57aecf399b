"""Pretraining from the weights of another model: a network for videos from one for images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import TrainingInputs, build_inputs
from fewstep.distill.config import Config
from fewstep.distill.data.batch import Batch
from fewstep.distill.run_folder import RunFolder
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import Model, load_model
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model
from fewstep.models.schedules import RectifiedFlow

CPU = torch.device("cpu")
NETWORK = {"widths": [8, 16], "blocks": [1, 1], "embedding": 8, "heads": 2}
IMAGE_WORDS, VIDEO_WORDS = ["red", "fox", "blue"], ["up", "blue", "fox", "down"]
VIDEO = {
    "backbone": {"name": "video_unet", **NETWORK},
    "shape": [3, 4, 8, 8],
    "vocabulary": {"words": VIDEO_WORDS, "length": 3},
}
ROLE = {"lr": 1e-3, "init": "model", "ema": 0.9}


class Clips:
    """Random videos and words."""

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        words = 1 + random.integers(size, 4)[:, None].expand(-1, 3)
        condition = Condition({"words": words}, {"words": torch.zeros(3, dtype=torch.int64)})
        return Batch(size, (3, 4, 8, 8), condition, {"x0": random.normal((size, 3, 4, 8, 8))})


def image_model(folder: Path, **changes: Any) -> Path:
    """A model for images in which every weight is random."""
    config = ModelConfig.model_validate(
        {
            "backbone": {"name": "unet", **NETWORK},
            "shape": [3, 8, 8],
            "vocabulary": {"words": IMAGE_WORDS, "length": 2},
            **changes,
        }
    )
    model = config.build()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    save_model(model, config, folder)
    return folder


def settings(folder: Path, **changes: Any) -> Config:
    stage = {"steps": 4, "objective": "flow_matching", "roles": {"student": ROLE}}
    quiet = {"health": {"every": 0}, "previews": {"every": 0}, "checkpoint": {"every": 2, "keep": 9}, "log_every": 1}
    return Config.model_validate(
        {
            "out": str(folder / "run"), "model": VIDEO, "model_weights": str(folder / "images"), "batch": 2,
            "device": "cpu", "stages": [stage], **quiet, **changes,
        }
    )  # fmt: skip


def inputs(config: Config, **options: Any) -> TrainingInputs:
    return build_inputs(config, CPU, data=Clips(), **options)


def weights(built: TrainingInputs) -> dict[str, torch.Tensor]:
    return built.roles["model"].module.backbone.state_dict()


def test_tensors_of_equal_name_are_taken_and_words_by_word(tmp_path: Path) -> None:
    images = load_model(image_model(tmp_path / "images")).denoiser.backbone.state_dict()
    built = inputs(settings(tmp_path))
    taken, new = weights(built), weights(inputs(settings(tmp_path, model_weights=None)))
    for name in new:
        if name == "words.weight":
            assert taken[name][[3, 2]].equal(images[name][[2, 3]])  # fox, blue
            assert taken[name][[0, 1, 4]].equal(new[name][[0, 1, 4]])  # none, up, down
        else:
            assert taken[name].equal(images.get(name, new[name])), name
    taken_from = f"(words: 2 of 4) were taken from {tmp_path / 'images'}, the others are new."
    assert list(built.notes) == [f"{len(images)} of {len(new)} tensors {taken_from}"]


def test_the_log_says_what_was_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_model(tmp_path / "images")
    fewstep.train(settings(tmp_path), data=Clips())
    assert "(words: 2 of 4) were taken from" in capsys.readouterr().out


def test_a_student_with_an_adapter_gives_its_merged_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from fewstep.models.adapters import share_network

    model = load_model(image_model(tmp_path / "base"))
    lora = share_network(model.denoiser, 2, None, None)
    student = model.denoiser.backbone.fork()
    for parameter in student.parameters():
        parameter.data.normal_()
    model.denoiser.backbone = student
    save_model(model.denoiser, model.config.model_copy(update={"base": str(tmp_path / "base"), "lora": lora}),
               tmp_path / "images")  # fmt: skip
    merged = student.merged().state_dict()
    taken = weights(inputs(settings(tmp_path)))
    torch.testing.assert_close(taken["mid.0.conv1.weight"], merged["mid.0.conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "unet", **NETWORK, "embedding": 16}}, r"time.0.weight has the shape \[16, 64\]"),
        ({"shape": [1, 8, 8]}, r"enter.weight has the shape \[8, 4, 3, 3\] in .*images, and \[8, 12, 3, 3\]"),
    ],
)
def test_weights_of_other_shapes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    image_model(tmp_path / "images", **changes)
    with pytest.raises(UserError, match=message):
        inputs(settings(tmp_path))


def test_a_model_that_shares_nothing_or_is_missing_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(backbone={"name": "mixture"}, shape=(2,))
    with pytest.raises(UserError, match="model_weights: No model at"):
        inputs(settings(tmp_path))
    other = Model(denoiser=Denoiser(torch.nn.Linear(2, 2), RectifiedFlow()), config=config)
    fewstep.register("teacher", "linear")(other)
    with pytest.raises(UserError, match="model_weights: no tensor of linear has a name of this model's"):
        inputs(settings(tmp_path, model_weights="linear"))


def test_a_resumed_run_is_the_run_and_does_not_read_the_model_again(tmp_path: Path) -> None:
    image_model(tmp_path / "images")
    whole = fewstep.train(settings(tmp_path, out=str(tmp_path / "whole")), data=Clips(), progress=False)
    run = fewstep.train(settings(tmp_path), data=Clips(), progress=False)
    shutil.rmtree(run / "student")
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    shutil.rmtree(tmp_path / "images")
    fewstep.train(resume=run, data=Clips(), progress=False)
    ours, theirs = (load_model(each).denoiser.state_dict() for each in (run, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "student")
    with pytest.raises(UserError, match="model_weights: No model at"):
        fewstep.train(resume=run, data=Clips(), progress=False)


def test_a_run_is_reopened_without_the_model(tmp_path: Path) -> None:
    fewstep.register("data", "random_clips")(Clips)
    image_model(tmp_path / "images")
    run = fewstep.train(settings(tmp_path, data={"kind": "random_clips"}), progress=False)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert RunFolder.reopen(run, CPU).trainer.step == 4
    with pytest.raises(UserError, match="model_weights: No model at"):
        RunFolder.reopen(run, CPU, before=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None, "teacher": "fashion"}, "a new network"),
        ({"stages": 2 * [{"steps": 1, "objective": "flow_matching", "roles": {"student": ROLE}}]}, "no later role"),
        ({"stages": [{"steps": 1, "objective": "flow_matching", "roles": {"student": ROLE}}, {
            "steps": 1, "objective": "flow_matching", "roles": {"student": {**ROLE, "init": "keep"}},
            "freeze": {"first": "model"}}]}, "no later role"),
    ],
)  # fmt: skip
def test_settings_that_cannot_act_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)
