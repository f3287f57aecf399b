"""Sampling frame by frame: an autoregressive process in closed form, videos of any length, memory, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, succeeds
from PIL import Image
from torch import Tensor
from worlds import FLOW

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.models.backbone import Backbone, Past
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import Model
from fewstep.models.model_config import FewStep, ModelConfig
from fewstep.models.saving import save_model
from fewstep.models.video_unet import VideoUNet
from fewstep.samplers.frames import sample_frames
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig, plan
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS

RHO, STD, SHIFT = 0.8, 0.5, 0.7
SHAPE = (1, 3, 2, 2)
LABELS = torch.zeros(3, dtype=torch.int64)
STUDENT = FewStep(times=(1.0, 0.5), rule="renoise", frame_by_frame=True)


class Autoregressive(Backbone):
    """The exact x0 of frames of N(RHO previous + SHIFT [with the condition], STD^2), of which the first follows 0, and
    so do frames after one that is not clean."""

    causal = True

    def after(self, past: Past | None, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Past]:
        previous = torch.zeros_like(x_t) if past is None else past[0]
        times = t.to(x_t).reshape(-1, 1, 1, 1, 1)
        mean = RHO * previous + SHIFT * (condition["labels"] == 0).to(x_t).reshape(-1, 1, 1, 1, 1)
        gain = STD**2 * (1 - times) / (STD**2 * (1 - times) ** 2 + times**2)
        return mean + gain * (x_t - (1 - times) * mean), (x_t * (times == 0),)


def exact(**few_step: Any) -> Model:
    config = ModelConfig(backbone={"name": "video_unet"}, shape=SHAPE, classes=1, **few_step)
    return Model(denoiser=Denoiser(Autoregressive(), FLOW, "x0"), config=config)


def process(frames: int, weight: float) -> Tensor:
    """What the exact flow makes of the noise of samples 0 to 2: mean + STD noise, frame after frame."""
    videos = []
    for number in range(3):
        random, previous, video = KeyedRandom(0, number, "sample", 0), torch.zeros(1, 1, 2, 2), []
        for _ in range(frames):
            previous = RHO * previous + SHIFT * weight + STD * random.normal((1, 1, 2, 2))
            video.append(previous)
        videos.append(torch.cat(video, 1))
    return torch.stack(videos)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_frames_are_those_of_the_process_to_the_solvers_order(guidance: float) -> None:
    """Guidance moves the mean of this law alone, so the guided process is known, too."""
    for solver, order in (("euler", 1), ("heun", 2)):
        errors = []
        for steps in (32, 64):
            sampling = SamplingConfig(solver, steps, guidance=guidance, frames=6)
            samples = generate(exact(), LABELS, sampling, batch=2)
            errors.append((samples.x0 - process(6, guidance)).abs().max().item())
        assert errors[1] < 0.05 / order
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_samples_frame_by_frame(solver: str) -> None:
    video = generate(exact(), LABELS, SamplingConfig(solver, 24, frames=5)).x0
    assert video.shape == (3, 1, 5, 2, 2)
    if SOLVERS[solver].noisy:
        assert (video[:, :, -1].mean() - SHIFT * sum(RHO**k for k in range(5))).abs() < 1.0, "the mean accumulates"
    else:
        assert (video - process(5, 1.0)).abs().max() < 0.2


def test_a_student_generates_frame_by_frame_at_any_length() -> None:
    """At t = 1 the exact x0 is the mean; from (mean + noise) / 2, at t = .5, it is mean + STD^2 / (STD^2 + 1) noise."""
    model = exact(few_step=STUDENT)
    usual = generate(model, LABELS, SamplingConfig())
    assert usual.x0.shape == (3, *SHAPE), "as many frames as in training"
    assert usual.nfe == 3, "of a frame: two steps, and one evaluation to keep it"
    longer = generate(model, LABELS, SamplingConfig(frames=7))
    assert longer.x0[:, :, :3].equal(usual.x0), "the same noise, frame by frame"
    random, previous = KeyedRandom(0, 1, "sample", 0), torch.zeros(1, 1, 2, 2)
    for k in range(7):
        mean = RHO * previous + SHIFT
        random.normal((1, 1, 2, 2))  # of pure noise, which the mean does not depend on
        noise = random.normal((1, 1, 2, 2))
        previous = mean + STD**2 / (STD**2 + 1) * noise
        torch.testing.assert_close(longer.x0[1, :, k : k + 1], previous)
    assert generate(exact(), LABELS, SamplingConfig("euler", 4, guidance=2.0, frames=5)).nfe == 2 * 5


def test_what_is_kept_does_not_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    after = VideoUNet.after

    def measured(self: VideoUNet, past: Past | None, *inputs: Any) -> tuple[Tensor, Past]:
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in past or ()))
        return after(self, past, *inputs)

    monkeypatch.setattr(VideoUNet, "after", measured)
    backbone = {"name": "video_unet", "widths": [8, 16], "blocks": [1, 1], "embedding": 8, "heads": 2}
    settings = {"backbone": {**backbone, "causal": True, "context": 4}, "shape": (3, 2, 8, 8), "few_step": STUDENT}
    config = ModelConfig.model_validate(settings)
    video = generate(Model(denoiser=config.build(), config=config), LABELS[:1], SamplingConfig(frames=20)).x0
    assert video.shape == (1, 3, 20, 8, 8)
    assert sizes[0] == 0 < sizes[3] < sizes[3 * 3] == sizes[-1]


def test_a_predictor_is_left_as_it_was_and_computes_in_its_precision() -> None:
    predict = Predictor(exact().denoiser, Condition.of_labels(LABELS, 1))
    before, seen = predict.denoiser, []

    def sample() -> Tensor:
        seen.append(predict.denoiser.precision)
        return predict(torch.zeros(3, 1, 1, 2, 2), 1.0).x0

    before.precision = torch.bfloat16
    video = sample_frames(predict, sample, 2)
    torch.testing.assert_close(video[0, 0, :, 0, 0], torch.tensor([SHIFT, SHIFT + RHO * SHIFT]))
    assert predict.denoiser is before
    assert seen == [torch.bfloat16] * 2


def test_a_request_without_frames_is_recorded_as_before() -> None:
    plain = {"solver": None, "steps": None, "guidance": 1.0, "grid": "time", "seed": 0}
    assert SamplingConfig().as_dict() == plain
    assert SamplingConfig(frames=9).as_dict() == {**plain, "frames": 9}


@pytest.mark.parametrize(
    ("few_step", "frames", "message"),
    [
        (None, 0, "at least 1"),
        (STUDENT, -1, "at least 1"),
        (FewStep(times=(1.0,), rule="renoise"), 9, "whole clips of 3 frames.*rollout: causal"),
    ],
)
def test_frames_that_a_causal_model_cannot_generate(few_step: FewStep | None, frames: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(exact(few_step=few_step), SamplingConfig(frames=frames))


def test_frames_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, causal in (("causal", {"causal": True}), ("whole", {})):
        backbone = {"name": "video_unet", "widths": [8], "blocks": [1], "embedding": 8, "heads": 2, **causal}
        words = {"words": ["fox", "cat"], "fillers": ["a"], "length": 1}
        config = ModelConfig.model_validate({"backbone": backbone, "shape": (3, 2, 8, 8), "vocabulary": words})
        save_model(config.build(), config, tmp_path / name)
    request = ("--prompt", "a fox", "--steps", "2", "--device", "cpu", "--frames", "5", "--out", tmp_path / "out")
    succeeds("sample", tmp_path / "causal", *request)
    with Image.open(tmp_path / "out" / "00000-0.gif") as video:
        assert video.n_frames == 5
    assert "only a causal model of videos" in refused(capsys, "sample", tmp_path / "whole", *request)
    assert "only a causal model of videos" in refused(capsys, "sample", "fashion", "--frames", "5")
    with pytest.raises(UserError, match="only a causal model"):
        fewstep.sample(tmp_path / "whole", prompts=["fox"], sampling=SamplingConfig(frames=5), device="cpu")
