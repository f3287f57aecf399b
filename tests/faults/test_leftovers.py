"""What a killed or failing command leaves is completed, repeated or removed by the next one, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from killed import Killed, kill_at
from safetensors.torch import load_file, save_file
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.core.files import (
    atomic_folder,
    delete_folder,
    remove_leftovers,
    require_empty,
    write_tensors,
    write_text,
)  # fmt: skip
from fewstep.distill.callback import Callback
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from fewstep.distill.config_files import parse_config
from fewstep.distill.metrics_logger import append_line, forget_after
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.trainer import Trainer
from fewstep.models.saving import require_sound

CPU = torch.device("cpu")


class KilledAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise Killed


def run_of(folder: Path, **changes: object) -> RunFolder:
    return RunFolder.create(parse_config(tiny_config(folder, **changes), "test"), CPU)


def killed(folder: Path, step: int, **changes: object) -> RunFolder:
    """A run that was killed after a step; its last checkpoint is that of a multiple of four."""
    run = run_of(folder, **changes)
    with pytest.raises(Killed):
        run.train(callbacks=[KilledAfter(step)])
    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Notes(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, trainer: Trainer, text: str) -> None:
        self.texts.append(text)


# ---- files and folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "new" / "student"
    with suppress(Killed), atomic_folder(final) as part:
        write_text("half", part / "a.txt")
        raise Killed
    assert not final.exists()
    for text in ("first", "second"):
        with atomic_folder(final) as part:
            write_text(text, part / "a.txt")
    with pytest.raises(UserError, match=r"Cannot write .*student: .*No space"), atomic_folder(final) as part:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (final / "a.txt").read_text() == "second"
    assert names(final.parent) == {"student"}


@pytest.mark.parametrize("calls", range(5))
def test_a_kill_while_a_folder_is_deleted_leaves_it_whole_or_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(name)

    with monkeypatch.context() as patch:
        kill_at(patch, calls, ((Path, "rename"), (os, "unlink"), (os, "rmdir")))
        with suppress(Killed):
            delete_folder(folder)
    assert not folder.exists() or names(folder) == {"a", "b"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) <= {"step-1"}


def test_leftovers_are_restored_or_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.part", ".b.old", ".c.old", "c", "d"):
        (tmp_path / name).mkdir()
    for name in (".e.part", "f.part", "g"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"b", "c", "d", "f.part", "g"}
    remove_leftovers(tmp_path, "f*.part")
    assert "f.part" not in names(tmp_path)


def test_only_unfinished_files_leave_a_folder_empty(tmp_path: Path) -> None:
    require_empty(tmp_path / "none")
    (tmp_path / "index.json.part").write_text("")
    require_empty(tmp_path)
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        require_empty(tmp_path)
    with pytest.raises(UserError, match="a is a file; name a folder"):
        require_empty(tmp_path / "a")


def test_a_log_keeps_the_lines_up_to_a_step_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    forget_after(file, 3)
    kept = b'{"step": 2}\nnot JSON\n{"step": 3,  "x": 1}\n'
    file.write_bytes(kept + b'{"step": 4}\n{"st')
    forget_after(file, 3)
    assert file.read_bytes() == kept
    file.write_bytes(kept + b'{"st')
    forget_after(file, 3)
    assert file.read_bytes() == kept
    append_line(file, {"step": 4})
    assert json.loads(file.read_bytes().splitlines()[-1]) == {"step": 4}
    file.write_bytes(b'{"step": 1}\n')
    forget_after(file, 0)
    assert names(tmp_path) == set()


# ---- runs


def test_a_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    run = killed(tmp_path, 7)
    append_line(run.folder / "lost_updates.jsonl", {"update": "fake", "step": 6, "cause": "x"})
    RunFolder.reopen(run.folder, CPU).train()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert not (run.folder / "lost_updates.jsonl").exists(), "step 6 was trained again, with no update lost"


def test_a_resumed_run_removes_what_was_half_written_or_half_deleted(tmp_path: Path) -> None:
    run = killed(tmp_path, 6, checkpoint={"every": 2, "keep": 1})
    folder = run.folder / "checkpoints"
    shutil.copytree(folder / "step-0000004", folder / ".step-0000005.part")  # a stop that was killed
    shutil.copytree(folder / "step-0000004", folder / "step-0000002")  # killed before older ones were deleted
    (run.folder / ".best.part").mkdir()
    (run.folder / "samples").mkdir()
    for name in ("step-0000005.png.part", "comparison.png.part"):
        (run.folder / "samples" / name).write_text("")
    RunFolder.reopen(run.folder, CPU).train()
    assert names(folder) == {"step-0000012"}
    assert names(run.folder / "samples") == {"comparison.png.part"}, "another command may be writing it"
    assert ".best.part" not in names(run.folder)


def test_a_finished_run_keeps_as_many_checkpoints_as_it_should(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint={"every": 4, "keep": 1})
    run.train()
    folder = run.folder / "checkpoints"
    shutil.copytree(folder / "step-0000012", folder / "step-0000008")  # killed before it was deleted
    RunFolder.reopen(run.folder, CPU).train()
    assert names(folder) == {"step-0000012"}


def test_a_damaged_newer_checkpoint_costs_no_sound_one(tmp_path: Path) -> None:
    """The run continues from step 1 because step 5 is damaged: at step 2 it keeps the sound one."""
    tensors, state = {"a": torch.zeros(2)}, {"stage": 0}
    for step in (1, 5):
        write_checkpoint(tmp_path, step, tensors, state, keep=2)
    (tmp_path / "step-0000005" / "state.json").write_text("{")
    write_checkpoint(tmp_path, 2, tensors, state, keep=1)
    assert read_checkpoint(checkpoints(tmp_path, 2)[-1])[1]["step"] == 2


def test_an_old_checkpoint_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    write_checkpoint(tmp_path, 1, {"a": torch.zeros(2)}, {}, keep=1)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (refuse if path.name == "step-0000001" else rename)(path, to))
    with pytest.raises(UserError, match=r"Cannot delete .*step-0000001: .*Permission denied"):
        write_checkpoint(tmp_path, 2, {"a": torch.zeros(2)}, {}, keep=1)
    assert len(checkpoints(tmp_path)) == 2


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100])


def fill_with_nan(weights: Path) -> None:
    write = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(weights).items()}
    save_file(write, weights)


@pytest.mark.parametrize("validated_again", [True, False])
@pytest.mark.parametrize(
    ("damage", "reason"), [(cut, "is not a readable safetensors file"), (fill_with_nan, "numbers that are not finite")]
)
def test_a_damaged_best_student_is_replaced(
    tmp_path: Path, damage: Callable[[Path], None], reason: str, validated_again: bool
) -> None:
    """By the best one validated from then on, or by the last student if there is none."""
    run = run_of(tmp_path, validation={"every": 4})
    scores = iter([1.0, 3.0])
    with pytest.raises(Killed):
        run.train(validate=lambda student, config, step: next(scores), callbacks=[KilledAfter(9)])
    assert run.trainer.best == {"value": 1.0, "step": 4}
    damage(run.folder / "best" / "model.safetensors")
    resumed, notes = RunFolder.reopen(run.folder, CPU), Notes()
    resumed.train(validate=(lambda student, config, step: 2.0) if validated_again else None, callbacks=[notes])
    assert any("best/model.safetensors" in text and reason in text for text in notes.texts)
    assert resumed.trainer.best == ({"value": 2.0, "step": 12} if validated_again else {})
    require_sound(run.folder / "student")


def test_a_disk_that_is_full_at_the_end_of_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best student is copied to ``student/``."""

    def full(*arguments: object, **settings: object) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device")])

    run = run_of(tmp_path, validation={"every": 12})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(UserError, match=r"Cannot write .*student: .*No space left"):
            run.train(validate=lambda student, config, step: 1.0)
    assert not (run.folder / "student").exists()
    RunFolder.reopen(run.folder, CPU).train()
    assert (run.folder / "student" / "config.json").is_file()


def test_a_refusal_inside_a_folder_keeps_its_message(tmp_path: Path) -> None:
    """What ``write_tensors`` refuses keeps its own message."""
    with pytest.raises(UserError, match="numbers that are not finite"), atomic_folder(tmp_path / "a") as part:
        write_tensors({"x": torch.tensor(float("nan"))}, part / "x.safetensors")


def test_a_checkpoint_that_does_not_fit_on_the_disk_says_why_and_once_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        write_checkpoint(tmp_path, 3, {"a": torch.zeros(2)}, {}, keep=2)
    folder, reason = tmp_path / "step-0000003", "[Errno 28] No space left on device"
    assert str(caught.value) == f"Cannot write the checkpoint {folder}: {reason}. Mend that, then use --resume."
    assert not list(tmp_path.iterdir())
