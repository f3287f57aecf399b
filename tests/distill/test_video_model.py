"""A native model of videos end to end: every objective and solver, previews, sampled files, the app, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused, succeeds
from PIL import Image, ImageSequence
from torch import Tensor

import fewstep
from fewstep.api.app import AppModels
from fewstep.api.app_page import click
from fewstep.core.image_files import read_video, to_bytes, to_images
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config import Config
from fewstep.distill.data.batch import Batch
from fewstep.distill.objectives import OBJECTIVES
from fewstep.eval.report.comparison import write_comparison
from fewstep.eval.validation import PromptValidation
from fewstep.models.condition import Condition
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model
from fewstep.samplers.solvers import SOLVERS

SHAPE = (3, 4, 8, 8)
WORDS = ("fox", "cat", "up", "down")
PROMPTS = ["a fox up", "a cat down", "fox"]
BACKBONE = {"name": "video_unet", "widths": [8, 16], "blocks": [1, 1], "embedding": 8, "heads": 2}
MODEL = {"backbone": BACKBONE, "shape": SHAPE, "vocabulary": {"words": WORDS, "fillers": ["a"], "length": 2}}
NO_WORD = torch.zeros(2, dtype=torch.int64)


class Clips:
    """Random videos of random words."""

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        condition = Condition({"words": 1 + random.integers(2 * size, 4).reshape(size, 2)}, {"words": NO_WORD})
        videos = {name: random.normal((size, *SHAPE), name) for name in ("x0", "noise", "winner", "loser")}
        return Batch(size, SHAPE, condition, videos)


def saved(folder: Path, **changes: Any) -> Path:
    """A random model of videos."""
    config = ModelConfig.model_validate({**MODEL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build()
        for parameter in model.parameters():  # the zero-initialised layers too
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(model, config, folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("video") / "teacher")


def trained(objective: str, folder: Path, teacher: Path | None, **changes: Any) -> Path:
    """One step of an objective, with health and previews where there is a teacher."""
    needed = OBJECTIVES.resolve(objective)()
    roles = {role: {"lr": 1e-3, "init": "teacher" if teacher else "model"} for role in needed.needs - {"teacher"}}
    stage: dict[str, Any] = {"steps": 1, "objective": objective, "roles": roles}
    if "discriminator" in roles:
        roles["discriminator"]["init"] = "new"
    if "reference" in roles:
        del roles["reference"]
        stage["freeze"] = {"reference": "teacher"}
    origin = {"teacher": str(teacher)} if teacher else {"model": MODEL}
    shown = {"health": {"every": 1, "conditions": 2, "seeds": 2, "teacher_steps": 2}, "previews": {"every": 1, "n": 2}}
    config = Config.model_validate(
        {"out": str(folder / "run"), "batch": 3, "device": "cpu", "stages": [stage], **origin, **shown, **changes}
    )
    return fewstep.train(config, data=Clips(), progress=False)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_every_objective_trains_a_model_of_videos_that_samples(objective: str, teacher: Path, tmp_path: Path) -> None:
    pretrains = OBJECTIVES.resolve(objective)().needs == {"student"}
    run = trained(objective, tmp_path, None if pretrains else teacher)
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(list(line.values())).all()
    videos = fewstep.sample(
        run, prompts=PROMPTS, device="cpu", sampling=fewstep.SamplingConfig(steps=2 if pretrains else None)
    )
    assert videos.shape == (3, 4, 3, 8, 8)
    with Image.open(run / "previews" / "step-0000001.png") as preview:
        assert preview.width >= 6 * 64  # of two videos the first, middle and last frame


def test_a_discriminator_on_features_of_videos(teacher: Path, tmp_path: Path) -> None:
    stage = {
        "steps": 1,
        "objective": {"name": "dmd2", "gan": {"weight": 1.0, "critic_weight": 1.0}, "critic_updates": 1},
        "roles": {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}, "discriminator": {"lr": 1e-3, "init": "new"}},
    }
    run = trained("dmd2", tmp_path, teacher, stages=[stage])
    line = json.loads((run / "metrics.jsonl").read_text())
    assert line["loss/gan"] == pytest.approx(np.log(2), rel=0.5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_samples_videos_with_guidance(solver: str, teacher: Path) -> None:
    sampling = fewstep.SamplingConfig(solver, 3, guidance=2.0)
    videos = fewstep.sample(teacher, prompts=PROMPTS, sampling=sampling, device="cpu")
    assert videos.shape == (3, 4, 3, 8, 8)
    assert videos[0].ne(videos[1]).any()
    plain = fewstep.sample(teacher, prompts=PROMPTS, sampling=fewstep.SamplingConfig(solver, 3), device="cpu")
    assert plain.ne(videos).any()


def test_a_video_without_layers_over_frames_is_sampled_like_its_frames(tmp_path: Path) -> None:
    """The axes of noise, sample and frames: each frame is the image that the image model draws from its noise."""
    folder = saved(tmp_path / "video")
    model = fewstep.load(folder, "cpu")
    network = model.denoiser.backbone
    for name, parameter in network.named_parameters():
        if name.startswith("temporal"):
            parameter.data.zero_()
    images = ModelConfig.model_validate({**MODEL, "backbone": {**BACKBONE, "name": "unet"}, "shape": (3, 8, 8)}).build()
    images.backbone.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("temporal")})
    videos = fewstep.sample(model, prompts=["fox up"], sampling=fewstep.SamplingConfig("euler", 2))
    x = KeyedRandom(0, 0, "sample", 0).normal(SHAPE)[None]
    condition = Condition({"words": torch.tensor([[1, 3]])})
    for k in range(4):
        frame = x[:, :, k]
        for t in (1.0, 0.5):
            frame = frame - 0.5 * images(frame, t, condition).velocity
        assert (videos[0, k].int() - to_bytes(frame)[0].int()).abs().max() <= 1


def test_frames_are_in_front_of_channels_in_what_is_shown() -> None:
    x0 = torch.linspace(-1, 1, 3 * 4).reshape(1, 3, 4, 1, 1).expand(2, -1, -1, 5, 6)
    shown = to_images(x0)
    assert shown.shape == (2, 4, 3, 5, 6)
    assert shown[0, 1, 2, 0, 0] == round((x0[0, 2, 1, 0, 0].item() + 1) * 127.5)
    assert to_images(x0[:, :, 0]).equal(to_bytes(x0[:, :, 0]))


def frames_of(file: Path) -> Tensor:
    with Image.open(file) as opened:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def test_prompts_on_the_command_line_become_animated_files(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    succeeds("sample", teacher, "--prompt", "a fox up", "--steps", "2", "--out", out, "--device", "cpu")
    sampling = fewstep.SamplingConfig(steps=2)
    expected = fewstep.sample(teacher, prompts=["a fox up"], sampling=sampling, device="cpu")[0]
    assert frames_of(out / "00000-0.gif").equal(expected)
    assert read_video(out / "00000-0.gif", 4).transpose(0, 1).equal(expected)
    assert "did you mean 'up'" in refused(capsys, "sample", teacher, "--prompt", "a fox upp", "--out", tmp_path / "b")


def test_videos_of_class_labels_are_a_moving_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model", vocabulary=None, classes=2)
    common = ("sample", model, "--n", "4", "--steps", "1", "--device", "cpu", "--out")
    assert "4 videos are in" in succeeds(*common, tmp_path / "grid.gif")
    assert frames_of(tmp_path / "grid.gif").shape == (4, 3, 2 * 49 - 1, 2 * 49 - 1)
    assert "must end in .gif" in refused(capsys, *common, tmp_path / "grid.png")
    with pytest.raises(fewstep.UserError, match="a grid of videos is a GIF"):
        fewstep.save_grid(torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8), tmp_path / "a.png", columns=1)


def test_a_student_of_videos_is_shown_by_the_app_and_beside_its_teacher(teacher: Path, tmp_path: Path) -> None:
    run = trained("tdm", tmp_path, teacher)
    models = [fewstep.load(source, "cpu") for source in (run, teacher)]
    with Image.open(write_comparison(*models, PROMPTS, tmp_path, columns=2, seed=0, guidance=None)) as image:
        assert image.width >= 2 * 17 - 1
    with Image.open(tmp_path / "comparison.gif") as moving:
        assert moving.n_frames == 4
        assert moving.size == tuple(side + side % 2 for side in image.size), "the rows, with even sides"
    app = AppModels.load(run, device="cpu")
    teachers, own = app.generate(app.check("a fox up", 4, 5, 2))
    assert own.images.shape == teachers.images.shape == (2, 4, 3, 8, 8)
    assert "data:image/gif" in click(app, "a fox up", 4, 0, 2, [])[0]


def test_validation_shows_a_row_of_frames_per_prompt(teacher: Path, tmp_path: Path) -> None:
    model = fewstep.load(teacher, "cpu")
    assert model.config.vocabulary is not None
    prompts = model.config.vocabulary.encode(PROMPTS)
    PromptValidation(fewstep.SamplingConfig(steps=2), 2, to_images, prompts, tmp_path)(model.denoiser, model.config, 7)
    with Image.open(tmp_path / "samples" / "step-0000007.png") as grid:
        assert grid.size == (4 * 9 - 1, 2 * 9 - 1)


def test_validation_against_images_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", vocabulary=None, classes=10)
    with pytest.raises(fewstep.UserError, match=r"3, 4, 8, 8"):
        fewstep.evaluate(folder, reference="fashion", steps=[1], n=2000, device="cpu")
