"""The reward ``prompt`` of emoji and of clips of them, and preferences between clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.api.data import make_preferences
from fewstep.api.evaluate import win_rates
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.emoji import shuffled
from fewstep.eval.networks.features import REFERENCES, ClassifierFeatures
from fewstep.eval.rewards.prompt import prompt
from fewstep.models.emoji import BACKGROUNDS
from fewstep.models.emoji_clips import ALIVE, MOTIONS, ClipCaptions

CLIPS, IMAGES = (ClassifierFeatures.load(REFERENCES / name) for name in ("emoji_video", "emoji"))
CAPTIONS = shuffled(ClipCaptions.of("train")).select(torch.arange(60))


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """As samples are: uint8 [N, F, 3, H, W]."""
    return CAPTIONS.render(KeyedRandom(0, 0, "test", 0)).transpose(1, 2)


def test_a_clip_is_rated_by_the_probability_of_its_name_over_all_frames(clips: Tensor) -> None:
    rated = prompt(CLIPS, clips, CAPTIONS.texts)
    assert rated.shape == (60,)
    assert ((rated >= 0) & (rated <= 1)).all()
    assert rated.median() > 0.9
    names = ClipCaptions((CAPTIONS.names + 1) % 48, CAPTIONS.motions, CAPTIONS.backgrounds)
    assert (prompt(CLIPS, clips, names.texts) < 0.2).float().mean() > 0.9
    half = clips.clone()  # another name in the second half of the frames
    half[:, 4:] = names.render(KeyedRandom(0, 0, "test", 0)).transpose(1, 2)[:, 4:]
    both = prompt(CLIPS, half, CAPTIONS.texts), prompt(CLIPS, half, names.texts)
    kept = (both[0] > 0) & (both[1] > 0) & (rated > 0.95)
    assert kept.sum() > 20
    assert (both[0] + both[1])[kept].median() == pytest.approx(1, abs=0.1)
    assert both[0][kept].median() == pytest.approx(0.5, abs=0.1)


def test_a_clip_of_another_background_or_motion_or_without_motion_is_worth_nothing(clips: Tensor) -> None:
    backgrounds = ClipCaptions(CAPTIONS.names, CAPTIONS.motions, (CAPTIONS.backgrounds + 1) % len(BACKGROUNDS))
    assert (prompt(CLIPS, clips, backgrounds.texts) == 0).all()
    right = prompt(CLIPS, clips, CAPTIONS.texts) > 0
    motions = ClipCaptions(CAPTIONS.names, (CAPTIONS.motions + 1) % len(MOTIONS), CAPTIONS.backgrounds)
    assert right.float().mean() > 0.9
    assert (prompt(CLIPS, clips, motions.texts)[right] == 0).all()
    still = clips[:, :1].expand_as(clips).contiguous()
    alive = ClipCaptions(CAPTIONS.names, torch.full_like(CAPTIONS.motions, ALIVE), CAPTIONS.backgrounds)
    assert (prompt(CLIPS, still, alive.texts) == 0).all()


def test_images_clips_captions_and_classifiers_that_do_not_fit_are_refused(clips: Tensor) -> None:
    texts = CAPTIONS.texts[:1]
    with pytest.raises(UserError, match=r"'emoji' are of images.*emoji-video"):
        prompt(IMAGES, clips[:1], texts)
    with pytest.raises(UserError, match="'a flat fox' is not a caption of an emoji, such as 'a shiny "):
        prompt(CLIPS, clips[:1], ["a flat fox"])
    with pytest.raises(UserError, match="at least 4 frames"):
        prompt(CLIPS, clips[:1, :3], texts)
    for images in (torch.zeros(1, 1, 28, 28), torch.zeros(1, 3, 16, 16)):
        with pytest.raises(UserError, match="'emoji' need uint8 images of shape"):
            prompt(IMAGES, images.byte(), ["a shiny fox on blue"])


def test_preferences_and_win_rates_of_the_bundled_model_of_clips(tmp_path: Path) -> None:
    captions, out = tmp_path / "captions.txt", tmp_path / "won.safetensors"
    captions.write_text("a shiny ghost jumping on red\na shiny frog spinning on blue\n")
    sampling = fewstep.SamplingConfig("euler", 1)
    make_preferences(
        "emoji-video", out, reward="brightness", n=2, candidates=2, captions=captions, sampling=sampling, device="cpu"
    )
    won = read_tensors(out)
    assert won["winner"].shape == (2, 3, 8, 32, 32)
    assert (won["winner"].clamp(-1, 1).mean((1, 2, 3, 4)) >= won["loser"].clamp(-1, 1).mean((1, 2, 3, 4))).all()
    rows = win_rates("emoji-video", "emoji-video", n=2, captions=captions, sampling=sampling, device="cpu")
    assert {row["reward"]: row["win_rate"] for row in rows} == dict.fromkeys(("brightness", "prompt", "symmetry"), 0.5)
    with pytest.raises(UserError, match="give captions"):
        win_rates("emoji-video", "emoji-video", n=2, rewards=["brightness"], sampling=sampling, device="cpu")
    with pytest.raises(UserError, match="give captions"):
        make_preferences("emoji", out, reward="prompt", n=2, sampling=sampling, device="cpu")
    with pytest.raises(UserError, match="in prompts, a list"):
        fewstep.sample("emoji", prompts="a shiny fox on blue", device="cpu")


def test_each_sample_is_rated_by_its_own_caption_however_many_are_generated_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a shiny fox on blue\na flat ghost on red\na flat cat on white\n")
    found = []
    for part in (500, 2):
        monkeypatch.setattr("fewstep.samplers.generate.PART", part)
        (row,) = win_rates(
            "emoji", "emoji", n=5, captions=captions, rewards=["prompt"], device="cpu",
            sampling=fewstep.SamplingConfig("euler", 4),
        )  # fmt: skip
        found.append(row["ours"])
    assert found[0] > 0.5
    assert found[1] == pytest.approx(found[0], rel=1e-3)
