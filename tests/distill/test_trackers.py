"""Trackers: what they receive, how mistakes and failures end, and that a resumed run goes on in the same place."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from worlds import state_of, tiny_config

import fewstep
from fewstep.core.errors import UserError
from fewstep.distill.callback import Callback, Interrupted
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.resume import flat_settings
from fewstep.distill.run_folder import RunFolder, replay_step, run_config
from fewstep.distill.trainer import Trainer

CPU = torch.device("cpu")
Events = list[tuple[str, Any]]


class Recorder(GeneralTracker):
    """A tracker of a user: it records its calls in ``events``; ``fails`` names one that raises."""

    name = "recorder"
    requires_logging_directory = True
    tracker = None
    events: ClassVar[Events] = []
    fails = ""

    def __init__(self, project: str, logging_dir: str, **options: Any) -> None:
        super().__init__()
        self._called("create", (project, logging_dir, options))

    def _called(self, event: str, detail: Any = None) -> None:
        if event == self.fails:
            raise ConnectionError("the network is down")
        self.events.append((event, detail))

    def start(self) -> None:
        self._called("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._called("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._called("log", (step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._called("images", (step, values))

    def finish(self) -> None:
        self._called("finish")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "events", [])
    return Recorder


class Notes(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, trainer: Trainer, text: str) -> None:
        self.texts.append(text)


class At(Callback):
    """Sends a signal, or raises, after a step."""

    def __init__(self, step: int, error: Exception | None = None) -> None:
        self.step, self.error = step, error

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step and self.error is not None:
            raise self.error
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def made(folder: Path, **changes: object) -> RunFolder:
    return RunFolder.create(parse_config(tiny_config(folder, **changes), "test"), CPU)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def of(recorder: type[Recorder], event: str) -> list[Any]:
    return [detail for name, detail in recorder.events if name == event]


def test_a_tracker_receives_the_config_once_every_line_of_the_log_and_the_end(
    tmp_path: Path, recorder: type[Recorder]
) -> None:
    run = made(tmp_path, trackers=["recorder"], log_every=2, validation={"every": 6, "n": 10})
    values = iter((2.0, 1.0))
    run.train(validate=lambda student, config, step: next(values))
    assert [name for name, _ in recorder.events[:3]] == ["create", "start", "config"]
    assert of(recorder, "create") == [("fewstep", str(tmp_path / "run"), {})]
    (config,) = of(recorder, "config")
    assert config["stages.0.objective.name"] == "tdm"
    assert config["stages.0.roles.student.lr"] == 1e-3
    assert all(value is None or isinstance(value, bool | int | float | str) for value in config.values())
    assert [{"step": step, **values} for step, values in of(recorder, "log")] == lines(tmp_path)
    assert [values["validation"] for _, values in of(recorder, "log") if "validation" in values] == [2.0, 1.0]
    assert recorder.events[-1] == ("finish", None)
    assert len(of(recorder, "finish")) == 1


@pytest.mark.parametrize("error", [None, RuntimeError("a bug"), UserError("a mistake")])
def test_trackers_are_finished_on_a_signal_and_on_an_error(
    tmp_path: Path, recorder: type[Recorder], error: Exception | None
) -> None:
    with pytest.raises(Interrupted if error is None else type(error)):
        made(tmp_path, trackers=["recorder"]).train(callbacks=[At(5, error)])
    assert recorder.events[-1] == ("finish", None)
    assert of(recorder, "log")[-1][0] == 5


@pytest.mark.parametrize("event", ["log", "finish", "images"])
def test_a_tracker_that_fails_in_training_is_left_with_one_warning(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    plain = made(tmp_path / "plain")
    plain.train()
    monkeypatch.setattr(recorder, "fails", event)
    notes = Notes()
    config = parse_config(tiny_config(tmp_path, trackers=["recorder"], previews={"every": 4, "n": 2}), "test")
    fewstep.train(config, callbacks=[notes], progress=False)
    (text,) = notes.texts
    assert "The tracker recorder failed" in text
    assert "the network is down" in text
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    assert (tmp_path / "run" / "student").is_dir()
    failed = {"log": 0, "images": 4, "finish": 12}[event]
    assert [step for step, _ in of(recorder, "log")] == list(range(1, failed + 1))


@pytest.mark.parametrize("event", ["create", "start", "config"])
def test_a_tracker_that_does_not_start_ends_before_the_first_step_and_the_folder_can_be_used(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    monkeypatch.setattr(recorder, "fails", event)
    (tmp_path / "run" / "wandb").mkdir(parents=True)  # as W&B leaves it
    (tmp_path / "run" / "environment.json").touch()
    with pytest.raises(UserError, match="The tracker recorder does not start: the network is down"):
        made(tmp_path, trackers=["tensorboard", "recorder"]).train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setattr(recorder, "fails", "")
    made(tmp_path, trackers=["recorder"]).train()
    assert len(lines(tmp_path)) == 12


def test_mistakes_in_the_list_are_found_in_the_config(tmp_path: Path) -> None:
    def refusal(value: object) -> str:
        with pytest.raises(UserError) as error:
            parse_config(tiny_config(tmp_path, trackers=value), "a.yaml")
        return str(error.value)

    assert "unknown tracker 'tensorbord'; did you mean 'tensorboard'? (known: " in refusal(["tensorbord"])
    assert "trackers.0 = 3: input should be a valid string" in refusal([3])
    assert "wandb is listed twice" in refusal(["wandb", "wandb"])
    assert "trackers = 'wandb': give a list of names, such as [wandb]" in refusal("wandb")


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.distill.trackers.find_spec", lambda name: None)
    for name, package in (("wandb", "wandb"), ("comet_ml", "comet-ml"), ("tensorboard", r"'fewstep\[tensorboard\]'")):
        with pytest.raises(UserError, match=f"trackers: {name} needs a package: pip install {package}"):
            made(tmp_path, trackers=[name])
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_numbers_and_previews_in_one_folder_also_after_resuming(tmp_path: Path) -> None:
    """Events after the step at which a run was resumed are replaced."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"trackers": ["tensorboard"], "previews": {"every": 4, "n": 2}}
    with pytest.raises(RuntimeError):
        fewstep.train(
            parse_config(tiny_config(tmp_path, **changes), "test"), callbacks=[At(6, RuntimeError())], progress=False
        )
    fewstep.train(resume=tmp_path / "run", progress=False)  # from step 4
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss/match")]
    logged = {line["step"]: line["loss/match"] for line in lines(tmp_path)}
    assert [step for step, _ in written] == list(range(1, 13))
    assert dict(written) == pytest.approx(logged)
    assert [event.step for event in events.Images("previews")] == [4, 8, 12]
    with Image.open(tmp_path / "run" / "previews" / "step-0000012.png") as image:
        assert (events.Images("previews")[-1].width, events.Images("previews")[-1].height) == image.size
    hparams = list((tmp_path / "run" / "tensorboard").glob("*/hparams.yml"))
    assert len(hparams) == 1, "the config once, not once more on resuming"
    assert "stages.0.objective.name: tdm" in hparams[0].read_text()


def test_wandb_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package replaced: what it would be called with."""
    calls: Events = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append(("log", (step, sorted(values)[:1])))

        def finish(self) -> None:
            calls.append(("finish", None))

    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.init = lambda **options: (calls.append(("init", options)), Run())[1]
    fake.config = types.SimpleNamespace(update=lambda values, **_: calls.append(("config", values)))
    fake.Image = lambda pixels: pixels
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with pytest.raises(Interrupted):
        made(tmp_path, trackers=["wandb"]).train(callbacks=[At(5)])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    RunFolder.reopen(tmp_path / "run", CPU).train()
    first, second = [options for name, options in calls if name == "init"]
    assert first["id"] == second["id"] == json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "run", str(tmp_path / "run"))
    assert (first["project"], second["project"]) == ("fewstep", "mine")
    assert [name for name, _ in calls].count("config") == 1
    assert [detail[0] for name, detail in calls if name == "log"] == list(range(1, 13))
    made(tmp_path / "other", trackers=["wandb"]).train()
    assert [options["id"] for name, options in calls if name == "init"][-1] != first["id"]


def test_a_finished_run_starts_no_tracker(tmp_path: Path, recorder: type[Recorder]) -> None:
    made(tmp_path, trackers=["recorder"]).train()
    recorder.events.clear()
    RunFolder.reopen(tmp_path / "run", CPU).train()
    assert recorder.events == []


def test_images_reach_a_tracker_as_pixels_on_white(tmp_path: Path, recorder: type[Recorder]) -> None:
    changes = {"trackers": ["recorder"], "previews": {"every": 6, "n": 2}}
    fewstep.train(parse_config(tiny_config(tmp_path, **changes), "test"), progress=False)
    images = of(recorder, "images")
    assert [step for step, _ in images] == [6, 12]
    (pixels,) = images[-1][1]["previews"]
    with Image.open(tmp_path / "run" / "previews" / "step-0000012.png") as image:
        assert pixels.shape == (image.height, image.width, 3)
        opaque = np.asarray(image)[..., 3] == 255
        assert (pixels[opaque] == np.asarray(image)[..., :3][opaque]).all()
    assert (pixels[0, -1] == 255).all(), "transparent in the file"


def old_run(folder: Path, tensorboard: bool) -> RunFolder:
    """A run as versions before ``trackers`` wrote it."""
    run = made(folder)
    run.train()
    config = (folder / "run" / "config.yaml").read_text()
    old = config.replace("trackers: []", f"tensorboard: {str(tensorboard).lower()}")
    old = old.replace("previews:\n  every: null\n  n: 8\n", "")
    assert "trackers" not in old
    assert "previews" not in old
    (folder / "run" / "config.yaml").write_text(old)
    for checkpoint in checkpoints(folder / "run" / "checkpoints"):
        tensors, state = read_checkpoint(checkpoint)
        del state["run"]["config"]["trackers"], state["run"]["config"]["previews"]
        state["run"]["config"]["tensorboard"] = tensorboard
        write_checkpoint(checkpoint.parent, state["step"], dict(tensors), state, keep=9)
    return run


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_run_of_before_opens_resumes_and_replays(tmp_path: Path, tensorboard: bool) -> None:
    before = state_of(old_run(tmp_path, tensorboard).trainer)
    assert run_config(tmp_path / "run").trackers == (("tensorboard",) if tensorboard else ())
    reopened = RunFolder.reopen(tmp_path / "run", CPU)
    assert all(torch.equal(value, before[name]) for name, value in state_of(reopened.trainer).items())
    recorded, computed = replay_step(tmp_path / "run", 7, CPU)
    assert recorded == computed
    reopened.train()
    assert json.loads((tmp_path / "run" / "resumes.jsonl").read_text())["changed"] == {}
    recorded, computed = replay_step(tmp_path / "run", 7, CPU)
    assert recorded == computed


def test_the_old_key_is_answered_with_the_new_one(tmp_path: Path) -> None:
    message = "unknown key 'tensorboard'; it is now called 'trackers: [tensorboard]'"
    for value in (True, False):
        with pytest.raises(UserError) as error:
            parse_config(tiny_config(tmp_path, tensorboard=value), "a.yaml")
        assert message in str(error.value)
    made(tmp_path).train()
    with pytest.raises(UserError) as error:
        run_config(tmp_path / "run", ["tensorboard=true"])
    assert message in str(error.value)


def test_trackers_may_change_when_a_run_is_resumed(tmp_path: Path, recorder: type[Recorder]) -> None:
    made(tmp_path).train()
    overrides = ["trackers=[recorder]", "stages.0.steps=14", "previews.every=7"]
    fewstep.train(None, *overrides, resume=tmp_path / "run", progress=False)
    assert [step for step, _ in of(recorder, "log")] == [13, 14]
    settings = load_config(tmp_path / "run" / "config.yaml").model_dump(mode="json")
    assert of(recorder, "config") == [dict(flat_settings(settings))]
