"""A run folder: resuming equals not stopping, every logged step can be replayed, and nothing is overwritten."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from worlds import state_of, tiny_config

from fewstep.core.errors import UserError
from fewstep.distill import matching
from fewstep.distill.callback import Callback, Interrupted
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from fewstep.distill.config_files import parse_config
from fewstep.distill.loop import LostUpdate
from fewstep.distill.run_folder import RunFolder, replay_step
from fewstep.distill.trainer import Trainer
from fewstep.models.loading import load_model

CPU = torch.device("cpu")


def make(folder: Path, **changes: object) -> RunFolder:
    return RunFolder.create(parse_config(tiny_config(folder, **changes), "test"), CPU)


class AtStep(Callback):
    """Calls a function when the log entry of a step is written."""

    def __init__(self, step: int, action: Callable[[Trainer], object]) -> None:
        self.step, self.action = step, action

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        if trainer.step == self.step:
            self.action(trainer)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_has_the_documented_contents(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.train()
    folder = tmp_path / "run"
    assert {file.name for file in folder.iterdir()} == {
        ".lock", "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "student",
    }  # fmt: skip
    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    student = load_model(folder / "student")
    assert student.config.few_step.times == (1.0, 0.5)
    saved = student.denoiser.backbone.state_dict()
    with run.trainer.roles["student"].averaged():
        averaged = run.trainer.roles.denoiser("student").backbone.state_dict()
        assert all(torch.equal(averaged[name], value) for name, value in saved.items())


def test_resuming_at_a_random_step_equals_not_stopping_bit_for_bit(tmp_path: Path) -> None:
    complete = make(tmp_path / "a")
    complete.train()
    stop = random.Random(7).randrange(1, 12)
    part = make(tmp_path / "b", checkpoint={"every": stop})
    interrupt = AtStep(stop, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=f"step {stop} of 12") as interrupted:
        part.train(callbacks=[interrupt])
    assert interrupted.value.folder == part.folder
    resumed = RunFolder.reopen(tmp_path / "b" / "run", CPU)
    assert resumed.trainer.step == stop
    resumed.train()
    assert equal(state_of(complete.trainer), state_of(resumed.trainer))
    lines = [[line | {"seconds": 0} for line in metrics(tmp_path / name / "run")] for name in "ab"]
    assert lines[0] == lines[1]


def test_every_logged_step_replays_bit_for_bit(tmp_path: Path) -> None:
    make(tmp_path).train()
    for step in range(1, 13):
        recorded, computed = replay_step(tmp_path / "run", step, CPU)
        assert recorded == computed
        assert recorded["loss/match"] > 0
    with pytest.raises(UserError, match=r"Step 13 was not logged; near it were 10, 11, 12\.$"):
        replay_step(tmp_path / "run", 13, CPU)


def test_the_log_contains_updates_that_are_never_due_at_a_logged_step(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, log_every=2)
    raw["stages"][0]["objective"]["critic_updates"] = 2  # type: ignore[index]
    RunFolder.create(parse_config(raw, "test"), CPU).train()
    for line in metrics(tmp_path / "run"):
        assert {"loss/match", "loss/critic"} <= set(line)
    recorded, computed = replay_step(tmp_path / "run", 6, CPU)
    assert recorded == computed
    assert "loss/match" in computed, "the student was updated one step earlier"


def test_a_lost_update_is_reported_and_recorded_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks receive it in its step, the run folder keeps it, and the log has finite numbers only."""
    weight, seen = matching.l1_weight, []

    class Reports(Callback):
        def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
            seen.append((trainer.step, lost))

    def broken(x: Tensor, reference: Tensor, *floor: float) -> Tensor:
        third = run.trainer.step == 2 and len(seen) == 0
        return weight(x, reference, *floor) * (float("nan") if third else 1.0)

    monkeypatch.setattr(matching, "l1_weight", broken)
    run = make(tmp_path)
    run.train(callbacks=[Reports()])
    assert seen == [(3, LostUpdate("student", 3, "loss/match is nan"))]
    (record,) = map(json.loads, (tmp_path / "run" / "lost_updates.jsonl").read_text().splitlines())
    assert record == {"update": "student", "step": 3, "cause": "loss/match is nan"}
    assert run.trainer.roles["student"].updates == 11
    assert all(math.isfinite(value) for line in metrics(tmp_path / "run") for value in line.values())


def test_the_lost_updates_that_end_training_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "l1_weight", lambda x, *_: x * float("nan"))
    run = make(tmp_path)
    with pytest.raises(UserError, match=r"of step 12 was not applied.*12 times in a row"):
        run.train()
    lines = (tmp_path / "run" / "lost_updates.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_what_the_device_skipped_is_read_now_and_then_in_a_run_that_does_not_log(tmp_path: Path) -> None:
    assert make(tmp_path, log_every=10**9).trainer.loop.read_every == 100
    assert make(tmp_path / "other", log_every=7).trainer.loop.read_every == 7


def test_checkpoints_are_complete_and_only_the_last_few_are_kept(tmp_path: Path) -> None:
    make(tmp_path, checkpoint={"every": 1, "keep": 3}).train()
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in kept] == ["step-0000010", "step-0000011", "step-0000012"]
    tensors, record = read_checkpoint(kept[-1])
    assert record["step"] == 12
    assert tensors["student/updates"] == 12


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path).train()
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    tensors, state = read_checkpoint(last)
    del state["evaluations"]
    write_checkpoint(last.parent, 12, dict(tensors), state, keep=9)
    with pytest.raises(UserError, match="has no 'evaluations': it is from another version of fewstep"):
        RunFolder.reopen(tmp_path / "run", CPU)


def test_a_full_disk_while_writing_a_checkpoint_leaves_the_last_one_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    after_six = AtStep(6, lambda trainer: monkeypatch.setattr("fewstep.core.files.save_file", full))
    with pytest.raises(UserError, match="No space left on device"):
        make(tmp_path).train(callbacks=[after_six])
    monkeypatch.undo()
    resumed = RunFolder.reopen(tmp_path / "run", CPU)
    assert resumed.trainer.step == 4
    resumed.train()
    complete = make(tmp_path / "complete")
    complete.train()
    assert equal(state_of(resumed.trainer), state_of(complete.trainer))


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        make(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_best_student_is_saved(tmp_path: Path) -> None:
    """Validation values fall, then rise: the run saves the student of the lowest one."""
    values = iter([5.0, 3.0, 4.0])
    run = make(tmp_path, validation={"every": 4, "n": 10})
    run.train(validate=lambda student, config, step: next(values))
    assert run.trainer.best == {"value": 3.0, "step": 8}
    at_eight = RunFolder.reopen(tmp_path / "run", CPU, before=8).trainer
    with at_eight.roles["student"].averaged():
        expected = at_eight.roles.denoiser("student").backbone.state_dict()
        saved = load_model(tmp_path / "run" / "student").denoiser.backbone.state_dict()
        assert all(torch.equal(expected[name], value) for name, value in saved.items())


def test_a_stage_starts_from_the_averaged_roles_of_the_previous_one_and_resumes(tmp_path: Path) -> None:
    """4 -> 2 steps: the second stage starts from the average of the first one, and frozen copies do not change."""
    stage = {
        "steps": 5,
        "objective": {"name": "dmd2", "steps": 4, "critic_updates": 1},
        "roles": {"student": {"lr": 1e-3, "ema": 0.5}, "fake": {"lr": 1e-3}},
    }
    second = {
        **stage,
        "objective": {"name": "dmd2", "steps": 2, "critic_updates": 1},
        "roles": {"student": {"init": "student", "lr": 1e-9}, "fake": {"lr": 1e-3}},
        "freeze": {"reference": "student"},
    }
    run = make(tmp_path, stages=[stage, second], checkpoint={"every": 3, "keep": 9})
    averages: dict[str, Tensor] = {}

    def keep_average(trainer: Trainer) -> None:
        averages.update({name: value.clone() for name, value in trainer.roles["student"].average.items()})

    run.train(callbacks=[AtStep(5, keep_average)])
    reference = dict(run.trainer.roles["reference"].module.named_parameters())
    assert averages
    assert all(torch.equal(reference[name], value) for name, value in averages.items())
    assert load_model(tmp_path / "run" / "student").config.few_step.times == (1.0, 0.5)
    resumed = RunFolder.reopen(tmp_path / "run", CPU, before=9)
    assert (resumed.trainer.step, resumed.trainer.stage) == (9, 1)
    resumed.train()
    assert equal(state_of(run.trainer), state_of(resumed.trainer))
    frozen = resumed.trainer.roles["reference"].module.state_dict()
    assert all(torch.equal(frozen[k], v) for k, v in run.trainer.roles["reference"].module.state_dict().items())
