"""Scores of clips: a perfect generator's are those of renders, and each fails where its own part of a clip is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.api.reference import reference_for
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.clip_scores import (
    clip_features,
    clip_scores,
    fd_clips,
    majority,
    relative_diversity,
    summarise,
)
from fewstep.eval.emoji import in_turn, renders
from fewstep.eval.evaluate_reference import clip_metrics
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.classifier import train_classifier
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.references import load_reference
from fewstep.models.emoji_clips import ALIVE, MOTIONS, SHAPE, ClipCaptions, load_animations
from fewstep.models.loading import load_model

NAMES, NUMBER = load_animations().names, {name: k for k, name in enumerate(MOTIONS)}
WORDS = ("ghost", "rainbow", "frog", "ufo")  # in another order than the art's
SOME = ClipCaptions.all().select(
    torch.isin(ClipCaptions.all().names, torch.tensor([NAMES.index(w) for w in WORDS])).nonzero()[:, 0]
)  # 4 names, 9 motions, 9 backgrounds


def rendered(captions: ClipCaptions, seed: int) -> Tensor:
    return captions.render(KeyedRandom(seed, 0, "scores", 0))


@dataclass(frozen=True)
class Scored:
    network: ClassifierFeatures
    captions: ClipCaptions
    clips: Tensor
    real: Tensor

    def scores(self, clips: Tensor | None = None, captions: ClipCaptions | None = None) -> dict[str, float]:
        clips = self.clips if clips is None else clips
        found = clip_scores(self.network, WORDS, clips, self.real, captions or self.captions)
        return {name: measured.value for name, measured in found.items()}


@pytest.fixture(scope="module")
def scored() -> Scored:
    """A small classifier of four names, trained on frames; and all clips of these names, twice."""
    frames = rendered(SOME, 0)[:, :, ::3].transpose(1, 2)
    classes = torch.tensor([WORDS.index(NAMES[name]) for name in SOME.names.tolist()])
    images, labels = frames.flatten(0, 1).contiguous(), classes.repeat_interleave(frames.shape[1])
    network = train_classifier(images, labels, epochs=6, seed=0, widths=(8, 16, 24, 24), batch=64)
    features = ClassifierFeatures("frames", "none", (3, 32, 32), network)
    return Scored(features, SOME, rendered(SOME, 1), rendered(SOME, 2))


def test_renders_score_nearly_perfectly(scored: Scored) -> None:
    scores = scored.scores()
    for name in ("prompt", "motion", "name"):
        assert scores[name] > 0.96, name
    assert scores["background"] == 1
    assert scores["agreement"] > 0.95
    assert abs(scores["speed"] - 1.25) < 0.06
    assert abs(scores["speed_deviation"] - 0.5 / math.sqrt(12)) < 0.03
    assert 0.02 < scores["change"] < 0.08
    assert all(scores[f"motion_{motion}"] > 0.9 for motion in MOTIONS)
    assert set(scores) == {
        "prompt", "motion", "name", "background", "agreement", "fd_clips", "speed", "speed_deviation", "change",
        *(f"motion_{name}" for name in MOTIONS),
    }  # fmt: skip


def test_words_of_a_caption_are_scored_one_by_one(scored: Scored) -> None:
    """Captions with one wrong word lose that score, and ``prompt``, and no other."""
    right, captions = scored.scores(), scored.captions
    names = torch.tensor([NAMES.index(w) for w in WORDS])
    other = names[((captions.names[:, None] == names).int().argmax(1) + 1) % 4]
    wrong = {
        "name": ClipCaptions(other, captions.motions, captions.backgrounds),
        "motion": ClipCaptions(captions.names, (captions.motions + 1) % 9, captions.backgrounds),
        "background": ClipCaptions(captions.names, captions.motions, (captions.backgrounds + 4) % 9),
    }
    for word, asked in wrong.items():
        scores = scored.scores(captions=asked)
        assert scores[word] < 0.4, word
        assert scores["prompt"] <= scores[word]
        for same in {"name", "motion", "background"} - {word}:
            assert scores[same] == right[same], (word, same)


def test_prompt_is_right_only_where_all_words_are(scored: Scored) -> None:
    """Every second caption has a wrong motion, and every other one a wrong background."""
    captions = scored.captions
    odd = torch.arange(len(captions)) % 2
    asked = ClipCaptions(captions.names, (captions.motions + odd) % 9, (captions.backgrounds + 1 - odd) % 9)
    scores = scored.scores(captions=asked)
    assert abs(scores["motion"] - 0.5) < 0.03
    assert scores["background"] == 0.5
    assert scores["prompt"] == 0


def test_motion_of_each_word_is_that_of_its_clips(scored: Scored) -> None:
    clips = scored.clips.clone()
    left = scored.captions.motions == NUMBER["left"]
    clips[left] = clips[left].flip(4)
    scores = scored.scores(clips)
    assert scores["motion_left"] < 0.05
    assert scores["motion_right"] > 0.9


def test_clips_that_stand_still_are_not_alive(scored: Scored) -> None:
    scores = scored.scores(scored.clips[:, :, :1].expand(-1, -1, 8, -1, -1))
    assert scores["motion"] == 0
    assert scores["motion_alive"] == 0
    assert scores["change"] == 0
    assert scores["agreement"] == 1


def test_speed_is_negative_for_clips_that_travel_the_other_way(scored: Scored) -> None:
    scores = scored.scores(scored.clips.flip(2))
    assert abs(scores["speed"] + 1.25) < 0.06
    alone = scored.captions.motions >= 4
    still = clip_scores(
        scored.network, WORDS, scored.clips[alone], scored.real, scored.captions.select(alone.nonzero()[:, 0])
    )
    assert "speed" not in still


def test_names_that_change_within_clips_disagree(scored: Scored) -> None:
    """Three of eight frames show another thing: the majority is right, and the agreement five eighths."""
    captions = scored.captions
    clips = scored.clips.clone()
    moved = torch.arange(len(captions)).roll(81)  # of the next name, with the same motion and background
    clips[:, :, 5:] = clips[moved][:, :, 5:]
    scores = scored.scores(clips)
    assert scores["name"] > 0.93
    assert abs(scores["agreement"] - 5 / 8) < 0.04


@pytest.mark.parametrize(
    ("classes", "named", "share"),
    [([4, 4, 1, 4], 4, 0.75), ([2, 5, 5, 2], 2, 0.5), ([9, 8, 7, 6], 6, 0.25), ([-1, -1, 3, 2], -1, 0.5)],
)
def test_the_majority_of_frames(classes: list[int], named: int, share: float) -> None:
    found, agreement = majority(torch.tensor([classes]))
    assert found.tolist() == [named]
    assert agreement.tolist() == [share]


def test_the_distance_sees_frames_and_their_order(scored: Scored) -> None:
    features, real = (clip_features(scored.network, clips) for clips in (scored.clips, scored.real))
    same = fd_clips(features, real).value
    assert fd_clips(real, real).value < 1e-3 < same
    assert fd_clips(features.flip(1), real).value > same  # backwards: growing becomes shrinking
    still = features[:, :1].expand_as(features)
    assert fd_clips(still, real).value > 3 * same
    few = scored.captions.motions == ALIVE
    assert fd_clips(features[few], real).bias is not None


def test_summaries_are_means_and_differences() -> None:
    features = torch.randn(500, 8, 3, generator=torch.Generator().manual_seed(0))
    summary = summarise(features)
    torch.testing.assert_close(summary[:, :3], features.sum(1) / 8)
    torch.testing.assert_close(summary[:, 3:], features[:, 7] - features[:, 0])
    shifted = features + torch.tensor([3.0, 0, 0])
    expected = frechet_distance(Statistics.of(summarise(shifted)), Statistics.of(summary))
    assert abs(expected - 9) < 1e-3
    assert abs(fd_clips(shifted, features).value - 9) < 1e-3


def test_features_are_those_of_single_frames(scored: Scored) -> None:
    clips = scored.clips[:5]
    features = clip_features(scored.network, clips)
    for frame in (0, 7):
        torch.testing.assert_close(features[:, frame], scored.network(clips[:, :, frame]), atol=1e-4, rtol=1e-4)


def test_diversity_is_relative_to_real_clips(scored: Scored) -> None:
    few = scored.captions.select(torch.arange(0, len(SOME), 7))
    n = len(few)
    twice = few.select(torch.arange(2 * n) % n)
    features, real = (clip_features(scored.network, rendered(twice, seed)) for seed in (3, 4))
    assert abs(relative_diversity(features, real, n) - 1) < 0.15
    middle = features.reshape(2, n, 8, -1).mean(0, keepdim=True)
    halved = (middle + 0.5 * (features.reshape(2, n, 8, -1) - middle)).flatten(0, 1)
    assert abs(relative_diversity(halved, features, n) - 0.5) < 1e-4
    assert relative_diversity(features[:n].repeat(2, 1, 1), real, n) == 0
    with pytest.raises(UserError, match="two clips of each caption"):
        relative_diversity(features[: n + 1], real, n)
    with pytest.raises(UserError, match="do not differ"):
        relative_diversity(real, features[:n].repeat(2, 1, 1), n)


def test_what_does_not_fit_together_is_refused(scored: Scored) -> None:
    network, clips, captions = scored.network, scored.clips[:4], SOME.select(torch.arange(4))
    with pytest.raises(UserError, match="4 classes, and 3 names"):
        clip_scores(network, WORDS[:3], clips, scored.real, captions)
    with pytest.raises(UserError, match="3 clips for 4 captions"):
        clip_scores(network, WORDS, clips[:3], scored.real, captions)
    with pytest.raises(UserError, match="the real clips are"):
        clip_scores(network, WORDS, clips, scored.real[:, :, :4], captions)
    with pytest.raises(UserError, match="the clips are torch"):
        clip_scores(network, WORDS, clips.float(), scored.real, captions)


def test_a_model_of_clips_is_scored_by_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders in place of a model's samples score as well as renders can; others' captions do not."""
    monkeypatch.setattr("fewstep.eval.clip_scores.RENDERS", 200)
    reference = load_reference("emoji-video-motion")
    assert reference.captions is not None
    assert reference.shape == SHAPE
    assert set(reference.captions.texts) == set(ClipCaptions.of("motion").texts)
    captions = in_turn(ClipCaptions.of("motion"), 100)
    clips = in_turn(captions, 200)
    values = clip_metrics(reference, renders(clips, "samples"), clips, len(captions))
    assert values["prompt"].value > 0.95
    assert values["weakest_motion"].value > 0.7
    assert values["diversity"].value > 1
    wrong = clips.select(torch.arange(200).roll(45))
    assert clip_metrics(reference, renders(clips, "samples"), wrong, 100)["motion"].value < 0.3
    inverted = clip_metrics(reference, 255 - renders(clips, "samples"), clips, 100)
    assert values["fd_clips"].value < 0.8 * inverted["fd_clips"].value


def test_the_bundled_model_fits_its_reference_and_no_other() -> None:
    model = load_model("emoji-video")
    assert reference_for("emoji-video") == "emoji-video"
    load_reference("emoji-video-background").require_fit(model.config)
    for name in ("emoji", "fashion"):
        with pytest.raises(UserError):
            load_reference(name).require_fit(model.config)
