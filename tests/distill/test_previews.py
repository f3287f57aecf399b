"""Previews: what they show, and that training does not notice them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import settings
from torch import Tensor
from worlds import Points, mlp, state_of, tiny_config

import fewstep
from fewstep.api.train import train_run
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_bytes
from fewstep.core.image_grid import comparison
from fewstep.distill import previews
from fewstep.distill.callback import Callback
from fewstep.distill.config_files import parse_config
from fewstep.distill.previews import _spread, _tiles
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.trainer import Trainer
from fewstep.models.loading import load_model
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig


def run_with(folder: Path, **changes: object) -> RunFolder:
    return train_run(parse_config(tiny_config(folder, **changes), "test"), None, progress=False)


def pixels(file: Path) -> Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "previews").glob("*"))


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def test_a_preview_shows_teacher_and_averaged_student_from_the_same_noise(tmp_path: Path) -> None:
    """Computed again from the saved models: the teacher by Heun with the objective's guidance, the student by its own
    rule, both from the noise of samples 0, 1, ... and for classes spread over all."""
    run_with(tmp_path, previews={"every": 5, "n": 4}, health={"teacher_steps": 3})
    assert files(tmp_path) == ["step-0000005.png", "step-0000010.png", "step-0000012.png"]
    labels = torch.tensor([0, 2, 5, 7])
    teacher = generate(load_model(tmp_path / "teacher"), labels, SamplingConfig("heun", 3, guidance=2.0))
    student = generate(load_model(tmp_path / "run" / "student"), labels, SamplingConfig())
    rows = [
        (f"teacher, {teacher.nfe} evaluations", to_bytes(teacher.x0)),
        (f"student at step 12, {student.nfe} evaluations", to_bytes(student.x0)),
    ]
    assert (teacher.nfe, student.nfe) == (10, 2)
    expected = torch.from_numpy(np.array(comparison(rows, scale=8)))
    assert torch.equal(pixels(tmp_path / "run" / "previews" / "step-0000012.png"), expected)


def test_training_is_the_same_with_and_without_previews(tmp_path: Path) -> None:
    without = run_with(tmp_path / "a", previews={"every": 0})
    with_previews = run_with(tmp_path / "b", previews={"every": 1, "n": 3})
    assert len(files(tmp_path / "b")) == 12
    expected = state_of(without.trainer)
    assert all(torch.equal(value, expected[name]) for name, value in state_of(with_previews.trainer).items())
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b"), "evaluations among them"


def test_by_default_previews_come_with_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.api.train._validation", lambda *_: Still())
    run_with(tmp_path / "a", validation={"every": 4})
    assert files(tmp_path / "a") == ["step-0000004.png", "step-0000008.png", "step-0000012.png"]
    run_with(tmp_path / "b", validation={"every": 4}, previews={"every": 0})
    run_with(tmp_path / "c")
    assert files(tmp_path / "b") == files(tmp_path / "c") == []


class Still:
    """A validation without images."""

    def __call__(self, *_: object) -> float:
        return 1.0

    def small(self, folder: Path) -> Still:
        return self


def test_the_teacher_is_sampled_once_per_guidance_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[tuple[str | None, float]] = []

    def counting(model: Any, condition: Any, config: SamplingConfig, **options: Any) -> Any:
        sampled.append((config.solver, config.guidance))
        return generate(model, condition, config, **options)

    monkeypatch.setattr(previews, "generate", counting)
    raw: dict[str, Any] = tiny_config(tmp_path, previews={"every": 3, "n": 2}, health={"teacher_steps": 1})
    (stage,) = raw["stages"]
    other = {**stage, "objective": {"name": "tdm", "steps": 2, "guidance": 1.0}}
    raw["stages"] = [{**stage, "steps": 6}, {**other, "steps": 6}]
    train_run(parse_config(raw, "test"), None, progress=False)
    assert [each for each in sampled if each[0] == "heun"] == [("heun", 2.0), ("heun", 1.0)]
    assert len([each for each in sampled if each[0] is None]) == 1 + 4, "once before the first step"


def test_what_cannot_work_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise UserError("no memory is left")

    monkeypatch.setattr(previews, "generate", broken)
    with pytest.raises(UserError, match=r"Previews \(the keys under previews:\) at step 0: no memory is left"):
        run_with(tmp_path, previews={"every": 5})
    monkeypatch.undo()
    run_with(tmp_path, previews={"every": 5})
    assert len(log_of(tmp_path)) == 12, "the folder was as good as empty"


def test_a_run_without_a_teacher_shows_its_student_alone(tmp_path: Path) -> None:
    raw = settings("flow_matching", tmp_path, "cpu", "float32")
    raw |= {"previews": {"every": 3, "n": 2}, "health": {"every": 0, "teacher_steps": 2}}
    fewstep.train(parse_config(raw, "test"), progress=False)
    image = pixels(Path(raw["out"]) / "previews" / "step-0000003.png")
    assert image.shape[0] == 20 + 64, "one label, one row of images of 8 pixels, enlarged 8 times"


def test_points_in_the_plane_have_no_previews_and_refuse_requested_ones(tmp_path: Path) -> None:
    def train(folder: Path, every: int | None) -> None:
        roles = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
        stage = {"steps": 2, "objective": {"name": "dmd2", "steps": 1, "guidance": 1.0}, "roles": roles}
        health = {"every": 0}
        raw = {"out": str(folder), "batch": 4, "stages": [stage], "previews": {"every": every}, "health": health}
        config = parse_config(raw, "test")
        fewstep.train(config, teacher=mlp(2, 0), data=Points(2), progress=False)

    with pytest.raises(UserError, match=r"previews.every = 1: samples \[2\] are no images.*Set previews.every=0"):
        train(tmp_path / "a", 1)
    assert not (tmp_path / "a").exists()
    train(tmp_path / "b", None)
    assert not (tmp_path / "b" / "previews").exists()


def test_callbacks_receive_every_preview(tmp_path: Path) -> None:
    """Also of a trainer without a folder."""
    seen: list[tuple[int, tuple[int, int]]] = []

    class Shows(Callback):
        def on_preview(self, trainer: Trainer, image: Image.Image) -> None:
            seen.append((trainer.step, image.size))

    config = parse_config(tiny_config(tmp_path, previews={"every": 6, "n": 3}), "test")
    trainer = Trainer.create(config, device="cpu")
    shown = previews.Previews.create(config, trainer.inputs)
    assert shown is not None
    trainer.callbacks = [shown, Shows()]
    trainer.train()
    assert [step for step, _ in seen] == [6, 12]
    assert all(height == 2 * (20 + 64) + 6 for _, (_, height) in seen)


@pytest.mark.parametrize(("n", "count", "expected"), [(4, 10, [0, 2, 5, 7]), (4, 4, [0, 1, 2, 3]), (3, 2, [0, 1, 0])])
def test_conditions_are_spread_over_all(n: int, count: int, expected: list[int]) -> None:
    assert _spread(n, count).tolist() == expected


def test_videos_show_three_frames_and_large_images_are_reduced() -> None:
    video = torch.arange(2 * 9, dtype=torch.uint8).reshape(2, 9, 1, 1, 1).expand(2, 9, 3, 4, 4)
    assert _tiles(video)[:, 0, 0, 0].tolist() == [0, 4, 8, 9, 13, 17]
    assert _tiles(video[:, :1])[:, 0, 0, 0].tolist() == [0, 9]
    large = torch.full((1, 3, 768, 1536), 200, dtype=torch.uint8)
    assert _tiles(large).shape == (1, 3, 256, 512)
    assert (_tiles(large) == 200).all()
