"""Signals and time limits: a checkpoint is written between two steps, and nothing is lost but a step cut short."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from worlds import state_of, tiny_config

from fewstep.distill.callback import Callback, Interrupted
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.trainer import Trainer
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig

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


def test_a_second_signal_cuts_a_validation_short_and_its_step_is_saved(tmp_path: Path) -> None:
    def long(student: Denoiser, config: ModelConfig, step: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not end it")

    run = run_of(tmp_path, validation={"every": 5})
    with pytest.raises(Interrupted, match="step 5 of 12"):
        run.train(validate=long)
    assert steps_saved(run) == [4, 5]
    resumed = RunFolder.reopen(run.folder, CPU)
    resumed.train()
    complete = run_of(tmp_path / "complete")
    complete.train()
    expected = state_of(complete.trainer)
    assert all(torch.equal(value, expected[name]) for name, value in state_of(resumed.trainer).items())


def test_a_second_signal_within_a_step_loses_that_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    update = run.trainer.loop.step

    def step(number: int) -> dict[str, torch.Tensor]:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(number)

    monkeypatch.setattr(run.trainer.loop, "step", step)
    with pytest.raises(Interrupted, match=r"within step 7, whose work is lost"):
        run.train()
    assert steps_saved(run) == [4]


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
