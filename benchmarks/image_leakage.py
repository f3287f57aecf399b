"""Conditional image leakage of image-to-video models (Zhao et al., arXiv 2406.15735), measured on moving emoji.

    python benchmarks/image_leakage.py    # writes results/emoji_video/image_leakage.json

It trains on a GPU if there is one, in minutes, else for more than an hour.

At the highest noise levels an image-to-video model can copy its first frame, which tells it more than the noisy clip
does, and videos stand still. Here the teacher ``emoji-video`` is trained further with the first frame as another input,
and every clip has a known motion. Two remedies of the paper are measured: sampling that starts below t = 1, from the
Gaussian nearest to the noisy clips there (Analytic-Init) or from noise alone, and training with noise on the first
frame that grows with t (TimeNoise). Clips are made with words, and without, where the first frame is all that is known.

The network, the source and the objective below are a user's own modules: ``docs/own_modules.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import fewstep
from fewstep.core.files import write_text
from fewstep.core.image_files import to_images, to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.batch import Batch
from fewstep.distill.data.emoji import Emoji
from fewstep.distill.objectives.flow_matching import FlowMatching
from fewstep.distill.update import MicroBatch
from fewstep.eval.clip_scores import clip_scores, real_set
from fewstep.eval.emoji import in_turn, renders, shuffled
from fewstep.eval.motion import read_motion
from fewstep.eval.networks.features import REFERENCES, ClassifierFeatures
from fewstep.models.backbone import Backbone
from fewstep.models.condition import Condition
from fewstep.models.denoiser import expand_like
from fewstep.models.emoji_clips import SHAPE, ClipCaptions, load_animations
from fewstep.models.guidance import Guidance
from fewstep.models.loading import Model, load_model
from fewstep.models.saving import save_model
from fewstep.models.video_unet import VideoUNet
from fewstep.samplers.predictor import Predictor

FILE = Path(__file__).parent.parent / "results" / "emoji_video" / "image_leakage.json"
STEPS, BATCH, NOISE = 1500, 12, 2.0  # of training; clips; the most noise on the first frame, for values in [-1, 1]
N, SOLVER_STEPS, GUIDANCE = 108, 12, 2.0
STARTS = (1.0, 0.9, 0.8)


# --- the model: an image beside every frame ---------------------------------------------------------------------------


class FirstFrameNet(Backbone):
    """A ``VideoUNet`` that sees ``condition["image"]`` [B, C, H, W] beside every frame."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.network = VideoUNet(**settings)

    @classmethod
    def build(cls, shape: tuple[int, ...], classes: int, **settings: Any) -> Self:
        return cls(channels=2 * shape[0], classes=classes, **settings)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        image = condition["image"][:, :, None].expand_as(x_t)
        return self.network(torch.cat([x_t, image], 1), t, condition)[:, : x_t.shape[1]]


def start(folder: Path) -> None:
    """Saves the model that computes what ``emoji-video`` does, whatever its image is."""
    origin = load_model("emoji-video")
    settings = {**origin.config.backbone, "name": "image_leakage:FirstFrameNet"}
    config = origin.config.model_copy(update={"backbone": settings})
    denoiser = config.build()
    theirs = origin.denoiser.backbone.state_dict()
    for name, tensor in denoiser.backbone.network.state_dict().items():
        tensor.zero_()
        tensor[tuple(slice(size) for size in theirs[name].shape)] = theirs[name]
    save_model(denoiser, config, folder)


# --- training: with the first frame, and with noise on it -------------------------------------------------------------


def with_first_frames(random: KeyedRandom, size: int) -> Batch:
    """Clips of emoji, their words, and their first frame."""
    batch = SOURCE(random, size)
    return Batch(size, SHAPE, batch.condition.replace(image=batch["x0"][:, :, 0]), {"x0": batch["x0"]})


class TimeNoise(FlowMatching):
    """Flow matching with noise on the image, of a deviation beta_m sigmoid(N(2 t^5 - 1, 1))."""

    most: float = NOISE

    def condition(self, micro: MicroBatch, t: Tensor) -> Condition:
        condition = super().condition(micro, t)
        image, level = condition["image"], micro.random.normal((len(t),), "level").double()
        deviation = self.most * torch.sigmoid(2 * t.to(level) ** 5 - 1 + level)
        noise = micro.random.normal(image.shape, "image")
        return condition.replace(image=image + expand_like(deviation, image).to(image) * noise)


def train(folder: Path, objective: str) -> Model:
    model = load_model(str(folder / "start"))
    config = {
        "out": str(folder / objective.split(":")[-1]), "model": model.config.model_dump(mode="json", exclude_none=True),
        "model_weights": str(folder / "start"), "data": {"kind": "image_leakage:first_frames"}, "batch": BATCH,
        "precision": "bfloat16", "health": {"every": 0}, "previews": {"every": 0}, "log_every": 100,
        "stages": [{
            "steps": STEPS,
            "objective": {
                "name": objective, "drop_condition": 0.2,
                "student_times": {"kind": "logit_normal", "mean": 1.0, "std": 1.2},
            },
            "roles": {
                "student": {
                    "init": "model", "lr": 5e-4, "betas": [0.9, 0.99], "warmup": 50, "lr_schedule": "cosine",
                    "ema": 0.99,
                },
            },
        }],
    }  # fmt: skip
    run = Path(config["out"])
    if not (run / "student").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        fewstep.train(parse_config(config, "image_leakage.py"))
    return load_model(str(run / "student"))


def first_frames() -> Any:
    return with_first_frames


# --- sampling from a start below t = 1 --------------------------------------------------------------------------------


def noisy_clips(t: float, real: Tensor, analytic: bool, noise: Tensor) -> Tensor:
    """States at time t: of the Gaussian with the mean of noisy ``real`` clips [M, ...], and the variance that is
    nearest to theirs in KL divergence; or noise alone."""
    if not analytic:
        return t * noise
    mean = real.mean(0)
    variance = (real - mean).square().mean()  # the trace of the covariance over the number of dimensions
    return (1 - t) * mean + (t**2 + (1 - t) ** 2 * variance).sqrt() * noise


@torch.no_grad()
def sample(model: Model, condition: Condition, x: Tensor, t: float, guidance: float) -> Tensor:
    """Clips, uint8 [N, 3, F, H, W], by Euler steps from the states ``x`` at time ``t``."""
    clips = []
    for rows in torch.arange(len(x)).split(24):
        predict = Predictor(model.denoiser, condition.index(rows), Guidance(guidance))
        state = x[rows]
        for now, following in pairwise((t * torch.linspace(1, 0, SOLVER_STEPS + 1)).tolist()):
            state = state + (following - now) * predict(state, now).velocity
        clips.append(to_images(state).transpose(1, 2))
    return torch.cat(clips)


# --- the measurement --------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start").is_dir():
        start(folder / "start")
    captions = in_turn(shuffled(ClipCaptions.of("train")), N)
    shown = renders(captions, "leakage/shown", 100)
    _, real, _ = real_set("emoji-video", "leakage/real")
    network, names = ClassifierFeatures.load(REFERENCES / "emoji_video"), load_animations().names
    vocabulary = load_model("emoji-video").config.vocabulary
    assert vocabulary is not None
    condition = vocabulary.encode(captions.texts)(torch.arange(N)).replace(image=to_unit(shown[:, :, 0]))
    noise = KeyedRandom(0, 0, "leakage/noise", 0).normal((N, *SHAPE))

    def measure(what: str, t: float | str, init: str, clips: Tensor, without: Tensor) -> dict[str, Any]:
        found = clip_scores(network, names, clips, real, captions)
        picked = ("fd_clips", "motion", "speed", "name", "change")
        row: dict[str, Any] = {"model": what, "start": t, "init": init} | {k: found[k].value for k in picked}
        row["first frame"] = (clips[:, :, 0].float() - shown[:, :, 0].float()).abs().mean().item() / 255
        row["change without words"] = read_motion(without).change.mean().item()
        print(json.dumps(row), flush=True)
        return row

    rows = [measure("rendered", "", "", shown, shown)]
    for objective, what in (("flow_matching", "plain"), ("image_leakage:TimeNoise", "noise on the image")):
        model = train(folder, objective)
        for t in STARTS:
            for init in ("analytic", "noise") if t == 0.9 else ("analytic",):
                states = noisy_clips(t, to_unit(real), init == "analytic", noise)
                clips = sample(model, condition, states, t, GUIDANCE)
                without = sample(model, condition.null(), states, t, 1.0)
                rows.append(measure(what, t, init if t < 1 else "", clips, without))
    write_text(json.dumps(rows, indent=1) + "\n", FILE)


SOURCE = Emoji.create("emoji_clips", load_model("emoji-video").config, images=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/image_leakage"), help="the folder of both models")
    torch.set_num_threads(1)
    importlib.import_module("image_leakage")  # a saved model never causes the import of its network
    main(parser.parse_args().runs)
