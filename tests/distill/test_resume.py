"""Resuming: what checkpoints are bound to, what a run may change, damaged checkpoints, and folders in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from worlds import state_of, tiny_config, tiny_teacher

from fewstep.core.errors import UserError
from fewstep.distill.callback import Callback
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, step_of, write_checkpoint
from fewstep.distill.config_files import parse_config
from fewstep.distill.resume import changes, read_resumes
from fewstep.distill.run_folder import RunFolder, replay_step, run_config
from fewstep.distill.trainer import Trainer
from fewstep.models.loading import load_model

CPU = torch.device("cpu")


class Notes(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, trainer: Trainer, text: str) -> None:
        self.texts.append(text)


def made(folder: Path, **changed: object) -> RunFolder:
    """A run that was trained to its end."""
    run = RunFolder.create(parse_config(tiny_config(folder, **changed), "test"), CPU)
    run.train()
    return run


def resumed(folder: Path, *overrides: str) -> RunFolder:
    return RunFolder.reopen(folder / "run", CPU, config=run_config(folder / "run", overrides))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda last: flip(last / "state.safetensors"),
        lambda last: (last / "state.safetensors").unlink(),
        lambda last: (last / "state.safetensors").write_bytes(b""),
        lambda last: edit(last / "state.json", '"step": 12', '"step": 11'),
        lambda last: (last / "state.json").write_text("3"),
        lambda last: (last / "state.json").write_bytes(b"\xff\xfe{"),
        lambda last: (last / "state.json").write_text("[" * 100_000),
        lambda last: (last / "state.json").unlink(),
    ],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_falls_back_with_a_word(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    complete = state_of(made(tmp_path).trainer)
    *_, last = checkpoints(tmp_path / "run" / "checkpoints")
    damage(last)
    run, notes = RunFolder.reopen(tmp_path / "run", CPU), Notes()
    assert run.trainer.step == 8
    run.train(callbacks=[notes])
    assert last.name in notes.texts[0]
    assert "continues from step 8" in notes.texts[0]
    assert all(torch.equal(value, complete[name]) for name, value in state_of(run.trainer).items())


def test_without_a_whole_checkpoint_the_run_is_not_begun_again(tmp_path: Path) -> None:
    made(tmp_path)
    for folder in checkpoints(tmp_path / "run" / "checkpoints"):
        flip(folder / "state.safetensors")
    with pytest.raises(UserError, match=r"step-0000012 is damaged.*step-0000004 is damaged.*No other checkpoint"):
        RunFolder.reopen(tmp_path / "run", CPU)


def test_checkpoints_are_ordered_by_step_and_other_folders_are_not_among_them(tmp_path: Path) -> None:
    for name in ("step-10000000", "step-9999999", "step-best", "step-0000001.bak", "step-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9999999", "step-10000000"]
    assert [path.name for path in checkpoints(tmp_path, before=9_999_999)] == ["step-9999999"]


@pytest.mark.parametrize(
    "override",
    ["seed=3", "batch=4", "accumulate=2", "stages.0.objective.guidance=3", "stages.0.roles.student.ema=0.5",
     "teacher=fashion", "precision=bfloat16", "stages.0.steps=11"],
)  # fmt: skip
def test_a_change_that_makes_another_run_is_refused(tmp_path: Path, override: str) -> None:
    made(tmp_path)
    with pytest.raises(UserError, match=r"cannot change this|after the end of its stage|data does not fit"):
        resumed(tmp_path, override)


def test_refusals_of_a_change_say_what_to_give_instead(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(UserError, match=r"stages\.0\.steps must be at least 12"):
        resumed(tmp_path, "stages.0.steps=11")
    with pytest.raises(UserError, match=r"batch: 8 -> 4\. It may change device,"):
        resumed(tmp_path, "batch=4")


def test_an_edited_config_is_refused_too(tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=r"seed: 0 -> 1.*restore the run's config.yaml"):
        RunFolder.reopen(tmp_path / "run", CPU)


def test_a_teacher_with_other_weights_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    tiny_teacher(tmp_path / "teacher", seed=1)
    with pytest.raises(UserError, match="teacher had other weights"):
        RunFolder.reopen(tmp_path / "run", CPU)


def test_a_resumed_run_may_train_longer_at_another_rate_and_records_it(tmp_path: Path) -> None:
    made(tmp_path)
    run = resumed(tmp_path, "stages.0.steps=15", "stages.0.roles.student.lr=2e-3", "log_every=3")
    run.train()
    assert run.trainer.step == 15
    (group,) = run.trainer.roles["student"].optimizer.param_groups  # type: ignore[union-attr]
    assert group["lr"] == 2e-3
    (record,) = read_resumes(tmp_path / "run")
    assert record["step"] == 12
    assert record["changed"] == {
        "log_every": [1, 3], "stages.0.steps": [12, 15], "stages.0.roles.student.lr": [1e-3, 2e-3],
    }  # fmt: skip
    assert run_config(tmp_path / "run").stages[0].steps == 15, "the run's config is the one in force"


def test_later_stages_may_change_and_be_added_but_not_past_ones(tmp_path: Path) -> None:
    stage = tiny_config(tmp_path)["stages"][0] | {"steps": 3}  # type: ignore[index]
    made(tmp_path, stages=[stage])
    config = parse_config(tiny_config(tmp_path, stages=[stage, stage | {"objective": "dmd2"}]), "test")
    run = RunFolder.reopen(tmp_path / "run", CPU, config=config)
    run.train()
    assert (run.trainer.step, run.trainer.stage) == (6, 1)
    with pytest.raises(UserError, match=r"stages\.0\.steps: 3 -> 4"):
        resumed(tmp_path, "stages.0.steps=4")


def test_steps_before_a_change_replay_with_the_settings_of_their_time(tmp_path: Path) -> None:
    made(tmp_path)
    resumed(tmp_path, "stages.0.steps=15", "stages.0.roles.student.lr=2e-2").train()
    for step in (3, 12, 13, 15):
        recorded, computed = replay_step(tmp_path / "run", step, CPU)
        assert recorded == computed, step
    for folder in checkpoints(tmp_path / "run" / "checkpoints"):
        if folder.name == "step-0000012":
            (folder / "state.json").unlink()
            (folder / "state.safetensors").unlink()
            folder.rmdir()
    with pytest.raises(UserError, match=r"changed .*at step 12, and no checkpoint between"):
        replay_step(tmp_path / "run", 14, CPU)


def test_a_run_on_another_number_of_processes_says_so(tmp_path: Path) -> None:
    made(tmp_path)
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    tensors, state = read_checkpoint(last)
    del state["parts"], state["record_sha256"]
    write_checkpoint(last.parent, 12, dict(tensors), state | {"run": state["run"] | {"processes": 4}}, keep=9)
    notes = Notes()
    resumed(tmp_path, "stages.0.steps=13").train(callbacks=[notes])
    assert "had 4 processes and has 1 now" in notes.texts[0]


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    class Second(Callback):
        def on_checkpoint(self, trainer: Trainer) -> None:
            with pytest.raises(UserError, match="Another process is training in"):
                RunFolder.reopen(tmp_path / "run", CPU).train()

    run = RunFolder.create(parse_config(tiny_config(tmp_path), "test"), CPU)
    run.train(callbacks=[Second()])
    RunFolder.reopen(tmp_path / "run", CPU).train()  # the end of training frees the folder


@pytest.mark.parametrize("new", [True, False])
def test_a_run_that_was_opened_before_another_trained_in_its_folder_changes_nothing(tmp_path: Path, new: bool) -> None:
    """Between opening a run and its first step lie health checks and validation, which take minutes."""
    config = parse_config(tiny_config(tmp_path), "test")
    if not new:
        made(tmp_path)
        config = config.model_copy(update={"stages": (config.stages[0].model_copy(update={"steps": 16}),)})
    runs = [
        RunFolder.create(config, CPU) if new else RunFolder.reopen(tmp_path / "run", CPU, config=config)
        for _ in range(2)
    ]
    runs[0].train()
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"Another process has trained in .* meanwhile"):
        runs[1].train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_a_run_is_not_read_to_resume_it_while_another_process_trains_it(tmp_path: Path) -> None:
    """That process deletes checkpoints and changes the log meanwhile; a replay reads without a claim."""
    steps = []

    class Second(Callback):
        def on_checkpoint(self, trainer: Trainer) -> None:
            with pytest.raises(UserError, match="Another process is training in"):
                RunFolder.reopen(tmp_path / "run", CPU)
            steps.append(RunFolder.reopen(tmp_path / "run", CPU, before=4).trainer.step)

    RunFolder.create(parse_config(tiny_config(tmp_path), "test"), CPU).train(callbacks=[Second()])
    assert steps == [4, 4, 4]


def test_a_run_is_not_resumed_into_another_folder(tmp_path: Path) -> None:
    made(tmp_path)
    other = tmp_path / "other"
    for out in (f"out={other}", "out=null"):
        with pytest.raises(UserError, match=r"a resumed run stays in .*run, so leave out= away"):
            resumed(tmp_path, out)
    shutil.copytree(tmp_path / "run", other)
    assert run_config(other, ["log_every=2"]).out == str(tmp_path / "run")
    run = RunFolder.reopen(other, CPU, config=run_config(other, ["stages.0.steps=13"]))
    run.train()
    assert [step_of(path) for path in checkpoints(other / "checkpoints")][-1] == 13
    assert [step_of(path) for path in checkpoints(tmp_path / "run" / "checkpoints")][-1] == 12


def test_what_a_killed_start_leaves_does_not_occupy_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for leftovers in ((".lock",), ("config.yaml.part", "environment.json"), ("config.yaml",)):
        for name in leftovers:
            (folder / name).write_text("")
        RunFolder.create(parse_config(tiny_config(tmp_path), "test"), CPU)
    (folder / "environment.json").unlink()
    with pytest.raises(UserError, match="not empty"):  # a config of the user's own is not overwritten
        RunFolder.create(parse_config(tiny_config(tmp_path), "test"), CPU)


def test_a_best_student_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    scores = iter([2.0, 1.0])
    run = RunFolder.create(parse_config(tiny_config(tmp_path, validation={"every": 6}), "test"), CPU)
    run.train(validate=lambda student, config, step: next(scores))
    best = tmp_path / "run" / "best"
    weights: dict[str, Tensor] = load_model(best).denoiser.state_dict()
    os.rename(best, best.with_name(".best.old"))
    RunFolder.reopen(tmp_path / "run", CPU).train()
    saved = load_model(tmp_path / "run" / "student").denoiser.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in saved.items())


def test_changes_are_listed_by_key() -> None:
    before, now = {"a": 1, "b": {"c": [1, 2]}, "d": None}, {"a": 1, "b": {"c": [1, 3, 4]}, "d": 0}
    assert changes(before, now) == {"b.c.1": (2, 3), "d": (None, 0), "b.c.2": (None, 4)}


def test_a_step_before_a_stage_was_added_replays_without_it(tmp_path: Path) -> None:
    stage = tiny_config(tmp_path)["stages"][0] | {"steps": 3}  # type: ignore[index]
    made(tmp_path, stages=[stage])
    config = parse_config(tiny_config(tmp_path, stages=[stage, stage | {"objective": "dmd2"}]), "test")
    RunFolder.reopen(tmp_path / "run", CPU, config=config).train()
    for step in (2, 5):
        recorded, computed = replay_step(tmp_path / "run", step, CPU)
        assert recorded == computed, step


def test_a_step_that_was_trained_again_replays_with_the_later_settings(tmp_path: Path) -> None:
    made(tmp_path)
    resumed(tmp_path, "stages.0.roles.student.lr=2e-2", "stages.0.steps=13").train()
    for step in (12, 13):
        flip(tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "state.safetensors")
    resumed(tmp_path, "stages.0.roles.student.lr=3e-2", "stages.0.steps=13").train()  # from step 8
    for step in (7, 10, 13):
        recorded, computed = replay_step(tmp_path / "run", step, CPU)
        assert recorded == computed, step
