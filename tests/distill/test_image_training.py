"""Training on images of one's own, with class labels and without: pretrain, distil, sample, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import image_sets
import pytest
import torch
from safetensors.torch import load_file
from worlds import write_idx

import fewstep
from fewstep.api.data import make_ode_pairs
from fewstep.api.report import compare_images
from fewstep.core.errors import UserError
from fewstep.core.files import write_tensors
from fewstep.core.image_files import to_bytes
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import build_inputs
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from fewstep.distill.config import Config
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.stored_files import read_stored

UNET = {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8, "heads": 1}


def pretraining(folder: Path, data: dict[str, Any], classes: int, **changes: Any) -> Config:
    settings = {
        "out": str(folder / "teacher"), "model": {"backbone": UNET, "shape": [3, 4, 4], "classes": classes},
        "data": data, "batch": 4, "device": "cpu", "log_every": 1, "checkpoint": {"every": 2, "keep": 9},
        "stages": [{
            "steps": 4, "objective": "flow_matching", "roles": {"student": {"init": "model", "lr": 1e-2}},
        }],
    }  # fmt: skip
    return parse_config({**settings, **changes}, "test")


def distillation(folder: Path, guidance: float, **changes: Any) -> Config:
    settings = {
        "out": str(folder / "student"), "teacher": str(folder / "teacher" / "student"), "batch": 4, "device": "cpu",
        "log_every": 1, "health": {"every": 1, "conditions": 2, "seeds": 2, "teacher_steps": 2},
        "previews": {"every": 1, "n": 2},
        "stages": [{
            "steps": 2, "objective": {"name": "dmd2", "steps": 2, "guidance": guidance, "critic_updates": 1},
            "roles": {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}},
        }],
    }  # fmt: skip
    return parse_config({**settings, **changes}, "test")


def model_config(run: Path) -> dict[str, Any]:
    return json.loads((run / "student" / "config.json").read_text())


def test_class_names_go_from_folders_to_the_student(tmp_path: Path) -> None:
    data = image_sets.class_folders(tmp_path / "set")
    teacher = fewstep.train(pretraining(tmp_path, {"kind": "folder", "path": data.path, "crop": True}, 3))
    student = fewstep.train(distillation(tmp_path, 1.5))
    assert model_config(teacher)["class_names"] == model_config(student)["class_names"] == list(image_sets.CLASSES)
    by_name, by_number = (fewstep.sample(student, n=2, labels=x, device="cpu") for x in (["dog", "bee"], [2, 0]))
    assert torch.equal(by_name, by_number)
    with pytest.raises(UserError, match="no class 'dogs'; did you mean 'dog'"):
        fewstep.sample(student, labels=["dogs"], device="cpu")
    assert fewstep.sample(student, n=6, device="cpu").shape == (6, 3, 4, 4)


def test_a_teachers_class_names_number_the_images_that_it_is_distilled_with(tmp_path: Path) -> None:
    data = image_sets.class_folders(tmp_path / "set")
    settings = {"kind": "folder", "path": data.path, "crop": True}
    fewstep.train(pretraining(tmp_path, settings, 3))
    shutil.rmtree(tmp_path / "set" / "bee")  # cat and dog are still the classes 1 and 2
    inputs = build_inputs(distillation(tmp_path, 1.5, data=settings), torch.device("cpu"))
    labels = inputs.sources["data"](KeyedRandom(0, 0, "data", 0), 50).condition["labels"]
    assert labels.unique().tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_a_run_on_flipped_images_resumes_as_if_it_had_not_stopped(kind: str, tmp_path: Path) -> None:
    data = image_sets.FORMS[kind](tmp_path)
    settings = {"kind": data.kind, "path": data.path, "crop": True, "flip": True}
    whole = fewstep.train(pretraining(tmp_path, settings, 3))
    weights = load_file(whole / "student" / "model.safetensors")
    for path in [whole / "student", *whole.glob("checkpoints/step-*4")]:
        shutil.rmtree(path)
    fewstep.train(resume=whole)
    again = load_file(whole / "student" / "model.safetensors")
    assert all(again[name].equal(weights[name]) for name in weights)
    plain = fewstep.train(pretraining(tmp_path, {**settings, "flip": False}, 3, out=str(tmp_path / "plain")))
    assert not all(load_file(plain / "student" / "model.safetensors")[name].equal(weights[name]) for name in weights)


def test_a_run_whose_classes_have_other_names_by_now_is_not_resumed(tmp_path: Path) -> None:
    data = image_sets.class_folders(tmp_path / "set")
    run = fewstep.train(pretraining(tmp_path, {"kind": "folder", "path": data.path, "crop": True}, 3))
    for path in [run / "student", *run.glob("checkpoints/step-*4")]:
        shutil.rmtree(path)
    (tmp_path / "set" / "bee").rename(tmp_path / "set" / "zebra")  # cat, dog, zebra: every label is another one
    with pytest.raises(UserError, match=r"had the classes bee, cat, dog, and has cat, dog, zebra now"):
        fewstep.train(resume=run)
    (tmp_path / "set" / "zebra").rename(tmp_path / "set" / "bee")
    fewstep.train(resume=run)


def test_an_unconditional_model_is_pretrained_distilled_and_sampled(tmp_path: Path) -> None:
    data = image_sets.class_folders(tmp_path / "set")
    teacher = fewstep.train(pretraining(tmp_path, {"kind": "folder", "path": data.path, "crop": True}, 0))
    assert "class_names" not in model_config(teacher)
    student = fewstep.train(distillation(tmp_path, 1.0))
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert "health/diversity_ratio" in {name for line in lines for name in line}
    assert sorted(file.name for file in (student / "previews").iterdir()) == ["step-0000001.png", "step-0000002.png"]
    images = fewstep.sample(student, n=5, device="cpu")
    assert (images.shape, len(images.flatten(1).unique(dim=0))) == ((5, 3, 4, 4), 5)
    assert compare_images(student, "cpu", columns=3).is_file()
    assert (student / "samples" / "diversity.png").is_file()
    make_ode_pairs(teacher, tmp_path / "pairs.safetensors", n=6, device="cpu")
    pairs = {"kind": "tensors", "path": str(tmp_path / "pairs.safetensors")}
    batch = build_inputs(distillation(tmp_path, 1.0, data=pairs), torch.device("cpu")).sources["data"](
        KeyedRandom(0, 0, "data", 0), 3
    )
    assert (set(batch), dict(batch.condition)) == ({"noise", "x0"}, {})


def test_guidance_and_labels_have_nothing_to_act_on_without_classes(tmp_path: Path) -> None:
    data = image_sets.class_folders(tmp_path / "set")
    teacher = fewstep.train(pretraining(tmp_path, {"kind": "folder", "path": data.path, "crop": True}, 0))
    with pytest.raises(UserError, match=r"Guidance 1\.5 has no condition to drop: set it to 1"):
        fewstep.train(distillation(tmp_path, 1.5))
    with pytest.raises(UserError, match="Guidance 2 has no condition to drop"):
        fewstep.sample(teacher, n=2, sampling=fewstep.SamplingConfig(guidance=2.0), device="cpu")
    with pytest.raises(UserError, match="This model is unconditional: leave labels out"):
        fewstep.sample(teacher, n=2, labels=[0], device="cpu")


def test_an_unconditional_model_is_validated_and_scored(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    write_idx(tmp_path, images, torch.zeros(20, dtype=torch.uint8), "train")
    network = {"backbone": {**UNET, "patch": 4}, "shape": [1, 28, 28]}
    config = pretraining(
        tmp_path, {"kind": "idx", "path": str(tmp_path)}, 0, model=network,
        validation={"every": 4, "n": 10, "solver": "euler", "steps": 2, "reference": "fashion"},
    )  # fmt: skip
    run = fewstep.train(config)
    assert (run / "samples" / "step-0000004.png").is_file()
    scores = {score.metric for score in fewstep.evaluate(run, steps=[2], n=12, device="cpu")}
    assert {"kid", "diversity"} <= scores
    assert "accuracy" not in scores


@pytest.mark.parametrize(
    ("data", "classes", "message"),
    [
        ({"kind": "folder", "path": "set"}, 3, r"0\.png is 6 x 4, but 4 x 4 is needed"),
        ({"kind": "folder", "path": "set", "crop": True}, 2, r"set has 3 classes .*, the model 2"),
        ({"kind": "folder", "path": "set/bee", "crop": True}, 2, "set/bee has no labels, and the model has 2 classes"),
    ],
)
def test_images_that_do_not_fit_the_model_are_refused(
    data: dict[str, Any], classes: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_sets.class_folders(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace("0\\.png", r"\d\.png")):
        fewstep.train(pretraining(tmp_path, data, classes))


def test_a_run_of_before_these_settings_resumes(tmp_path: Path) -> None:
    data = image_sets.class_folders(tmp_path / "set")
    run = fewstep.train(pretraining(tmp_path, {"kind": "folder", "path": data.path, "crop": True}, 3))
    for checkpoint in checkpoints(run / "checkpoints"):
        tensors, state = read_checkpoint(checkpoint)
        del state["run"]["config"]["data"]["flip"], state["run"]["config"]["data"]["columns"]
        write_checkpoint(checkpoint.parent, state["step"], dict(tensors), state, keep=9)
    fewstep.train(None, "stages.0.steps=5", resume=run)
    assert (run / "checkpoints" / "step-0000005").is_dir()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "labels", "flip": True}, "flip is for images"),
        ({"kind": "tensors", "path": "x", "crop": True}, "crop is for images"),
        ({"kind": "folder", "path": "x", "split": "test"}, "split does not act on kind folder"),
        ({"kind": "npz"}, "kind npz needs a path"),
        ({"kind": "dataset", "path": "x", "columns": {"lable": "y"}}, "lable"),
    ],
)
def test_data_settings_that_do_not_act_are_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pretraining(tmp_path, data, 3)


def test_a_column_of_captions_does_not_act_for_a_model_of_labels(tmp_path: Path) -> None:
    data = image_sets.csv(tmp_path)
    settings = {"kind": "dataset", "path": data.path, "columns": {"caption": "text"}, "crop": True}
    with pytest.raises(UserError, match=r"columns\.caption does not act: this model takes no captions"):
        build_inputs(pretraining(tmp_path, settings, 3), torch.device("cpu"))


def test_pixels_reach_training_unchanged(tmp_path: Path) -> None:
    data = image_sets.npz(tmp_path)
    config = pretraining(
        tmp_path, {"kind": "npz", "path": data.path}, 3, model={"backbone": UNET, "shape": [3, 4, 6], "classes": 3}
    )
    batch = build_inputs(config, torch.device("cpu")).sources["data"](KeyedRandom(0, 0, "data", 0), 40)
    known = torch.from_numpy(image_sets.PIXELS).permute(0, 3, 1, 2)
    for image, label in zip(to_bytes(batch["x0"]), batch.condition["labels"].tolist(), strict=True):
        (row,) = (known == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert image_sets.LABELS[row] == label


def test_stored_samples_of_an_unconditional_model_need_no_labels(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors({"noise": torch.zeros(6, 1, 2, 2), "x0": torch.ones(6, 1, 2, 2)}, file)
    batch = read_stored(file, 0)(KeyedRandom(0, 0, "data", 0), 4)
    assert (batch.size, dict(batch.condition), batch["x0"].shape) == (4, {}, (4, 1, 2, 2))
    with pytest.raises(UserError, match="must contain labels and samples"):
        read_stored(file, 3)
