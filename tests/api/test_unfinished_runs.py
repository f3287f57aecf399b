"""Runs that are not finished, and their checkpoints, as models; a run as another run's teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import ADAPTERS, TINY, settings, write_embeddings
from worlds import tiny_config

import fewstep
from fewstep.api import models
from fewstep.core.errors import UserError
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from fewstep.distill.config_files import parse_config
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.loading import Model

FOUR = fewstep.SamplingConfig(steps=2, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fewstep.train(parse_config(tiny_config(tmp_path_factory.mktemp("runs")), "test"), progress=False)


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    copied = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(copied / "student")
    return copied


def weights(model: Model) -> dict[str, torch.Tensor]:
    return model.denoiser.backbone.state_dict()


def assert_same(ours: Model, theirs: Model) -> None:
    assert ours.config == theirs.config
    assert weights(ours).keys() == weights(theirs).keys()
    assert all(torch.equal(weights(ours)[name], value) for name, value in weights(theirs).items())


def test_the_student_of_the_last_checkpoint_is_the_one_that_was_saved(run: Path, unfinished: Path) -> None:
    assert_same(fewstep.load(unfinished), fewstep.load(run))
    assert_same(fewstep.load(checkpoints(run / "checkpoints")[-1]), fewstep.load(run))
    ours, theirs = (fewstep.sample(source, n=4, sampling=FOUR) for source in (unfinished, run))
    assert torch.equal(ours, theirs)


def test_an_earlier_checkpoint_has_the_averaged_weights_of_its_step(run: Path) -> None:
    checkpoint = checkpoints(run / "checkpoints")[0]
    found, tensors = weights(fewstep.load(checkpoint)), read_checkpoint(checkpoint)[0]
    for name, value in found.items():
        assert torch.equal(value, tensors[f"student/average/backbone.{name}"])
    assert any(not torch.equal(value, tensors[f"student/weights/backbone.{name}"]) for name, value in found.items())


def test_a_damaged_newest_checkpoint_is_passed_over(unfinished: Path) -> None:
    newest, *_ = reversed(checkpoints(unfinished / "checkpoints"))
    (newest / "state.json").write_text("{")
    assert_same(fewstep.load(unfinished), fewstep.load(checkpoints(unfinished / "checkpoints")[-2]))
    with pytest.raises(UserError, match=r"state\.json"):
        fewstep.load(newest)


@pytest.mark.parametrize("record", [None, {}, {"config": {"format": "other"}, "roles": ["student"]}, {"config": 3}])
def test_a_checkpoint_that_does_not_describe_its_student_is_refused(unfinished: Path, record: Any) -> None:
    for checkpoint in checkpoints(unfinished / "checkpoints"):
        tensors, state = read_checkpoint(checkpoint)
        tensors, state = (
            dict(tensors),
            {k: v for k, v in state.items() if k not in ("parts", "record_sha256", "student")},
        )
        described = {} if record is None else {"student": record}
        write_checkpoint(checkpoint.parent, state["step"], tensors, state | described, keep=9)
    with pytest.raises(UserError, match=r"earlier version|state\.json"):
        fewstep.load(unfinished)


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("phases", [1, 2])
def test_experts_and_adapters_are_put_together(tmp_path: Path, adapters: dict[str, Any] | None, phases: int) -> None:
    """After the first of two phases the steps of the second are the teacher's."""
    pytest.importorskip("peft")
    folder = tmp_path / "sd"
    TINY["sd"].build().save_pretrained(folder)
    write_embeddings("sd", folder)
    raw = settings(folder, "sd", tmp_path / "run", adapters, health={"every": 0})
    phased = {"name": "phased_dmd", "steps": 4, "phases": 2, "critic_updates": 1}
    rates = {role: {"lr": 0.01} for role in ("student", "fake")}
    stages = [
        {"steps": 1, "objective": phased | {"phase": 1}, "roles": rates},
        {"steps": 1, "objective": phased | {"phase": 2}, "roles": rates, "freeze": {"expert1": "student"}},
    ]
    raw["stages"] = stages[:phases]
    run = fewstep.train(parse_config(raw, "test"), progress=False)
    assert_same(fewstep.load(checkpoints(run / "checkpoints")[-1]), fewstep.load(run))
    if not adapters:
        last = checkpoints(run / "checkpoints")[-1]
        exported = fewstep.export(last, ExportFormat.diffusers, tmp_path / "out")
        assert (exported / "model_index.json").is_file()


def test_a_run_is_a_teacher_and_its_scores_are_known(run: Path, tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, teacher=str(run))
    raw["stages"][0]["steps"] = 1  # type: ignore[index]
    second = fewstep.train(parse_config(raw, "test"), progress=False)
    assert json.loads((second / "student/config.json").read_text())["few_step"]["times"] == [1.0, 0.5]
    raw["out"], raw["teacher"] = str(tmp_path / "other"), str(run / "student")
    other = fewstep.train(parse_config(raw, "test"), progress=False)
    assert_same(fewstep.load(second), fewstep.load(other))


def test_an_unfinished_run_is_no_teacher(unfinished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no student yet: finish it by fewstep train --resume "):
        fewstep.train(parse_config(tiny_config(tmp_path, teacher=str(unfinished)), "test"), progress=False)


def test_scores_of_a_checkpoint_name_its_step_and_stay_out_of_the_runs_file(
    unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is chosen once: a run that goes on may write a newer one, and delete the first."""
    pixels = torch.randint(0, 256, (60, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(tmp_path / "set.npz", images=pixels.numpy())
    fewstep.make_reference(tmp_path / "set.npz", tmp_path / "reference", network="random")
    chosen: list[Path] = []
    newest = models.newest_checkpoint
    monkeypatch.setattr(models, "newest_checkpoint", lambda run: chosen.append(run) or newest(run))
    scores = fewstep.evaluate(unfinished, reference=str(tmp_path / "reference"), steps=[1, 2], n=20, device="cpu")
    assert {score.model for score in scores} == {"unfinished, step 12"}
    assert len(chosen) == 1
    assert not (unfinished / "eval.json").exists()


def test_a_run_may_be_called_student(run: Path, tmp_path: Path) -> None:
    renamed = shutil.copytree(run, tmp_path / "student")
    assert models.run_of(renamed) == models.run_of(renamed / "student") == renamed
    assert_same(fewstep.load(renamed), fewstep.load(run))


def test_an_empty_folder_of_checkpoints_is_none(unfinished: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "checkpoints").mkdir()
    for use in (fewstep.load, lambda run: fewstep.export(run, "diffusers", run / "out")):
        with pytest.raises(UserError, match=r"has no student yet, and no checkpoint\. Continue it"):
            use(unfinished)
    assert fewstep.report(unfinished).is_file()


def test_a_finished_run_whose_student_is_damaged_is_not_taken_for_an_unfinished_one(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "student/config.json").unlink()
    with pytest.raises(UserError, match=r"student/config\.json is missing, so .* is no model\. Restore the file"):
        fewstep.load(copied)


def test_a_moved_run_is_sampled_and_resumed(unfinished: Path, tmp_path: Path, run: Path) -> None:
    moved = unfinished.rename(tmp_path / "moved")
    assert_same(fewstep.load(moved), fewstep.load(run))
    fewstep.train(resume=moved, progress=False)
    assert_same(fewstep.load(moved / "student"), fewstep.load(run))


def test_a_run_outlives_its_teacher(run: Path, tmp_path: Path) -> None:
    """A student that is a copy needs its teacher for comparisons alone; the message names the run that had it."""
    from fewstep.api.app import AppModels
    from fewstep.api.report import compare_images

    first = shutil.copytree(run, tmp_path / "first")
    raw = tiny_config(tmp_path, teacher=str(first))
    raw["stages"][0]["steps"] = 1  # type: ignore[index]
    second = fewstep.train(parse_config(raw, "test"), progress=False)
    shutil.rmtree(first)
    assert fewstep.sample(second, n=2).shape == (2, 1, 8, 8)
    assert fewstep.report(second).is_file()
    for use in (compare_images, AppModels.load):
        with pytest.raises(UserError, match=f"The teacher of {second}, as its config.yaml names it: No model at"):
            use(second)
    assert AppModels.load(second, run).teacher is not None


def test_a_student_without_a_pipeline_has_no_export(run: Path, tmp_path: Path) -> None:
    for source in (run, run / "student", checkpoints(run / "checkpoints")[-1]):
        model = "the student folder of the finished run" if source.name.startswith("step-") else run / "student"
        with pytest.raises(UserError, match=f"is not the student of a diffusers pipeline.* copy {model} "):
            fewstep.export(source, "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
