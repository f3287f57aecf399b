"""Progress of training: lines by time off a terminal, a bar on one, nothing if it is to be quiet."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worlds import tiny_config

import fewstep
from fewstep.api.training_progress import FIRST_LINE, LINES, TrainingProgress
from fewstep.distill.callback import Callback
from fewstep.distill.config_files import parse_config
from fewstep.distill.loop import LostUpdate
from fewstep.distill.trainer import Trainer


class Run:
    """A pretend run of steps that last ``seconds`` each by its own clock."""

    def __init__(self, steps: int, seconds: float, loading: float = 0.0) -> None:
        self.now, self.seconds = 0.0, seconds
        config = SimpleNamespace(log_every=10, health=SimpleNamespace(every=50))
        self.trainer: Any = SimpleNamespace(step=0, config=config, best={}, seconds=0.0)
        self.progress = TrainingProgress(steps, clock=lambda: self.now)
        self.now += loading

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.progress.on_step_begin(self.trainer)
            self.now += self.seconds
            self.trainer.step += 1
            if self.trainer.step % 10 == 0:
                self.progress.on_log(self.trainer, {"loss/match": self.trainer.step / 100, "grad_norm/student": 1.0})
            self.progress.on_step(self.trainer)

    def validate(self, value: float, seconds: float) -> None:
        self.now += seconds
        self.trainer.best = {"value": min(value, self.trainer.best.get("value", value)), "step": self.trainer.step}
        self.progress.on_validation(self.trainer, value)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def steps_of(printed: list[str]) -> list[int]:
    return [int(line.split("/")[0].removeprefix("step ")) for line in printed]


def test_what_is_done_before_the_first_step_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Run(10, 1.0).progress.before_training("trying the health check")
    assert lines(capsys) == ["Before the first step: trying the health check."]


def test_lines_come_by_time_whatever_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """The first after a few seconds, then one about every 30 seconds."""
    for seconds in (0.01, 0.5, 7.0, 100.0):
        run = Run(10_000, seconds)
        run.steps(round(200 / seconds))
        times = [step * seconds for step in steps_of(lines(capsys))]
        assert FIRST_LINE <= times[0] < FIRST_LINE + seconds + 1e-6
        gaps = [b - a for a, b in pairwise(times)]
        assert all(LINES - 1e-6 <= gap < LINES + seconds + 1e-6 for gap in gaps)
        assert len(times) == 1 + len(gaps)


def test_a_line_has_step_speed_time_left_losses_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(100, 2.0)
    run.steps(10)
    run.validate(3.0, 60.0)
    run.steps(10)
    run.validate(3.5, 60.0)
    last = lines(capsys)[-1]
    assert last == "step 20/100  2 s/step  ETA 0:02:40  match 0.2000  score 3.5 (best 3)"


def test_validations_and_checkpoints_do_not_count_as_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Each pause of ten minutes would add as much to the time of a step as 1200 steps."""
    run = Run(1000, 0.5)
    for _ in range(3):
        run.steps(10)
        run.validate(1.0, 600.0)
        run.now += 600.0
        run.progress.on_checkpoint(run.trainer)
    assert "0.5 s/step  ETA 0:08:05" in lines(capsys)[-1]


def test_the_speed_is_that_of_recent_steps(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(1000, 10.0)
    run.steps(5)
    run.seconds = 1.0
    run.steps(60)
    run.progress.on_checkpoint(run.trainer)
    assert "1 s/step" in lines(capsys)[-1]


def test_every_validation_and_checkpoint_has_a_line_and_no_state_two(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(100, 0.01)
    run.steps(20)
    run.validate(3.0, 1.0)
    run.progress.on_checkpoint(run.trainer)  # at the same step
    run.steps(5)
    run.progress.on_checkpoint(run.trainer)
    assert steps_of(lines(capsys)) == [20, 25]


def test_a_resumed_run_names_its_best_score_before_it_validates(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(100, 10.0)
    run.trainer.best = {"value": 1.25, "step": 4}
    run.steps(1)
    assert lines(capsys) == ["step 1/100  10 s/step  ETA 0:16:30  best score 1.25"]


def test_remarks_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(100, 10.0)
    text = "[red]step 3[/red] :smile: of /data/" + 300 * "x"
    run.progress.on_note(run.trainer, text)
    run.progress.on_lost_update(run.trainer, LostUpdate("student", 3, "loss/match is nan"))
    assert lines(capsys) == [text, str(LostUpdate("student", 3, "loss/match is nan"))]


class Losses(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step(self, trainer: Trainer) -> None:
        self.steps.append(trainer.step)


def test_python_prints_lines_beside_callbacks_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = Losses()
    fewstep.train(parse_config(tiny_config(tmp_path / "a"), "test"), callbacks=[mine])
    printed = lines(capsys)
    states = [line for line in printed if "/12  " in line]
    assert {4, 8, 12} <= set(steps_of(states)), "its checkpoints"
    logged = json.loads((tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"match {logged['loss/match']:.4f}" in states[-1]
    assert printed[-1].startswith("Trained 12 steps in ")
    assert mine.steps == list(range(1, 13))
    fewstep.train(resume=tmp_path / "a" / "run")
    assert lines(capsys) == ["All 12 steps of this run were done already."]
    fewstep.train(parse_config(tiny_config(tmp_path / "b"), "test"), progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_has_a_bar_and_no_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes any output for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    fewstep.train(parse_config(tiny_config(tmp_path), "test"))
    out = capsys.readouterr().out
    assert "━" in out
    assert "step 12/12" in out
    assert not [line for line in out.splitlines() if line.startswith("step ")]
