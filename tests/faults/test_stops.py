"""Signals and time limits: a checkpoint is written between two steps, and nothing is lost but a step cut short."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from worlds import state_of, tiny_config

from fewstep.core.json_files import read_json_lines
from fewstep.distill.callback import Callback, Interrupted
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config_files import parse_config
from fewstep.distill.roles import Role
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.stop_requests import signals_interrupt
from fewstep.distill.trainer import Trainer
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_weights

CPU = torch.device("cpu")


def run_of(folder: Path, **changes: object) -> RunFolder:
    return RunFolder.create(parse_config(tiny_config(folder, **changes), "test"), CPU)


class Signals(Callback):
    """Sends a signal to this process after a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), self.number)


def steps_saved(run: RunFolder) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(run.folder / "checkpoints")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_writes_a_checkpoint_of_its_step(tmp_path: Path, name: str) -> None:
    run, before = run_of(tmp_path), signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted, match=rf"stopped at step 3 of 12 \({name}\)") as stopped:
        run.train(callbacks=[Signals(3, getattr(signal, name))])
    assert stopped.value.folder == run.folder
    assert steps_saved(run) == [3]
    assert signal.getsignal(getattr(signal, name)) == before
    RunFolder.reopen(run.folder, CPU).train()


def test_a_time_limit_stops_as_a_signal_does_and_the_next_start_has_its_own(tmp_path: Path) -> None:
    run = run_of(tmp_path, max_hours=1e-9)
    for step in (1, 2):
        with pytest.raises(Interrupted, match=rf"step {step} of 12 \(max_hours = 1e-09\)"):
            (run if step == 1 else RunFolder.reopen(run.folder, CPU)).train()
        assert steps_saved(run) == list(range(1, step + 1))


def test_the_first_signal_is_announced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step can last minutes."""
    run = run_of(tmp_path)

    class Impatient(Callback):
        def on_step_begin(self, trainer: Trainer) -> None:
            send(2 if trainer.step == 2 else 0)

    with pytest.raises(Interrupted):
        run.train(callbacks=[Impatient()])
    assert capfd.readouterr().err.count("SIGTERM: training stops after this step") == 1


def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step lasts 40 seconds, and a checkpoint is due when the last one is 90 seconds old, or every 7 steps."""
    now = [0.0]
    monkeypatch.setattr("fewstep.distill.trainer.time.monotonic", lambda: now[0])

    class Slow(Callback):
        def on_step_begin(self, trainer: Trainer) -> None:
            now[0] += 40.0

    run = run_of(tmp_path, checkpoint={"every": 7, "minutes": 1.5, "keep": 20})
    run.train(callbacks=[Slow()])
    assert steps_saved(run) == [3, 6, 7, 10, 12]


def test_a_second_signal_cuts_a_validation_short_and_its_step_is_saved(tmp_path: Path) -> None:
    def long(student: Denoiser, config: ModelConfig, step: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not end it")

    run = run_of(tmp_path, validation={"every": 5})
    with pytest.raises(Interrupted, match="step 5 of 12"):
        run.train(validate=long)
    assert steps_saved(run) == [4, 5]
    resumes_as_if_undisturbed(run, tmp_path / "complete")


def resumes_as_if_undisturbed(run: RunFolder, folder: Path) -> None:
    resumed, complete = RunFolder.reopen(run.folder, CPU), run_of(folder)
    resumed.train()
    complete.train()
    expected = state_of(complete.trainer)
    assert all(torch.equal(value, expected[name]) for name, value in state_of(resumed.trainer).items())


def send(count: int, number: int = signal.SIGTERM) -> None:
    for _ in range(count):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("signals", "saved"), [(2, [4, 7]), (3, [4])])
def test_two_signals_within_a_step_lose_nothing_and_a_third_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int, saved: list[int]
) -> None:
    run = run_of(tmp_path, validation={"every": 7})
    update = run.trainer.loop.step

    def step(number: int) -> dict[str, torch.Tensor]:
        if number == 6:
            send(signals)
        return update(number)

    def validate(student: Denoiser, config: ModelConfig, step: int) -> float:
        raise AssertionError("two signals leave out what can be")

    monkeypatch.setattr(run.trainer.loop, "step", step)
    expected = "at step 7 of 12" if signals == 2 else "within step 7: all after the last checkpoint is lost"
    with pytest.raises(Interrupted, match=expected):
        run.train(validate=validate)
    assert steps_saved(run) == saved


@pytest.mark.parametrize("event", ["on_log", "on_validation", "on_end"])
def test_no_number_of_signals_leaves_files_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """The best student is the one that the run says is the best; the log has every line. A validation after the signals
    is left out."""
    validated = event != "on_log"

    class WhileWriting(Callback):
        def send(self, trainer: Trainer, *_: object) -> None:
            send(5 if trainer.step in (5, 12) else 0)

    setattr(WhileWriting, event, WhileWriting.send)
    run = run_of(tmp_path, validation={"every": 5}, log_every=1)
    train, write = run.trainer, save_weights

    def save(*arguments: object) -> None:
        if event == "on_validation":
            send(5)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("fewstep.distill.run_folder.save_weights", save)
    try:
        run.train(validate=lambda student, config, step: 10.0 - step, callbacks=[WhileWriting()])
    except Interrupted:
        assert train.step == 5
    assert train.best.get("step") == (train.step if validated else None)
    lines, _ = read_json_lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation" not in line] == list(range(1, train.step + 1))
    assert (run.folder / "best" / "model.safetensors").is_file() == validated
    assert (run.folder / "student").is_dir() == (train.step == 12)


def test_no_signal_leaves_weights_half_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on with the weights that a validation exchanged for their averages."""
    load = Role._load

    def load_interrupted(role: Role, values: dict[str, torch.Tensor]) -> None:
        names = [name for name, _ in role.module.named_parameters()]
        for number, (name, parameter) in enumerate(role.module.named_parameters()):
            with torch.no_grad():
                parameter.copy_(values[name])
            if number == len(names) // 2:
                send(2)

    run = run_of(tmp_path, validation={"every": 5})
    monkeypatch.setattr(Role, "_load", load_interrupted)
    with pytest.raises(Interrupted, match="step 5 of 12"):
        run.train(validate=lambda student, config, step: 1.0)
    monkeypatch.setattr(Role, "_load", load)
    resumes_as_if_undisturbed(run, tmp_path / "complete")


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_of(tmp_path).train(callbacks=[Signals(3, signal.SIGHUP)])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_every_signal_ends_what_comes_before_training(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        send(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_signal_cuts_a_checkpoint_short(tmp_path: Path) -> None:
    class WhileSaving(Callback):
        def on_checkpoint(self, trainer: Trainer) -> None:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            saved.append(trainer.step)

    saved: list[int] = []
    run = run_of(tmp_path)
    with pytest.raises(Interrupted, match="step 5 of 12"):
        run.train(callbacks=[WhileSaving()])
    assert saved == steps_saved(run) == [4, 5]
