"""Scores of emoji: what renders score, what each score notices, and the references and models that fit them."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import refused, succeeds
from torch import Tensor

import fewstep
from fewstep.core.errors import UserError
from fewstep.eval.emoji import SPLITS, backgrounds_of, edge_strength, in_turn, renders, shuffled
from fewstep.eval.evaluate_reference import ReferenceEvaluator, emoji_metrics, reference_direction
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.features import extract_features
from fewstep.eval.references import Reference, load_reference
from fewstep.eval.validation import SEED, Validation
from fewstep.models.emoji import BACKGROUNDS, PALETTE, EmojiCaptions, Split
from fewstep.models.loading import load_model
from fewstep.samplers.plan import SamplingConfig

N = 400
references = cache(load_reference)
REFERENCE = references("emoji")
CAPTIONS = in_turn(shuffled(EmojiCaptions.of("train")), N)
IMAGES = renders(CAPTIONS, "test")


def scores(images: Tensor, captions: EmojiCaptions = CAPTIONS, reference: Reference = REFERENCE) -> dict[str, float]:
    return {name: each.value for name, each in emoji_metrics(reference, images, captions).items()}


@pytest.mark.parametrize(("name", "split"), SPLITS.items())
def test_renders_of_each_split_score_nearly_perfectly(name: str, split: Split) -> None:
    reference, captions = references(name), in_turn(shuffled(EmojiCaptions.of(split)), N)
    values = emoji_metrics(reference, renders(captions, "test"), captions)
    shares = {metric: values[metric].value for metric in ("name", "style", "background", "prompt")}
    assert min(shares.values()) > 0.98, shares
    assert values["sharpness"].value == pytest.approx(1, abs=0.03)
    bias = values["fd_emoji"].bias
    assert bias is not None
    assert values["fd_emoji"].value == pytest.approx(bias, rel=0.3), "what other renders of the captions score"
    assert bias < 0.05 * scores(IMAGES.flip(3)[:, [2, 0, 1]])["fd_emoji"]


def test_every_score_of_damaged_images_is_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, IMAGES.shape, dtype=torch.uint8, generator=generator)
    good, bad = scores(IMAGES), scores(noise)
    for name, value in good.items():
        if name != "sharpness":
            assert (value < bad[name]) == (reference_direction(name) == "lower"), name
    blurred = torch.nn.functional.avg_pool2d(IMAGES.float(), 5, 1, 2, count_include_pad=False).to(torch.uint8)
    assert scores(blurred)["sharpness"] < 0.8
    assert bad["sharpness"] > 2


@pytest.mark.parametrize("word", ["name", "style", "background"])
def test_a_wrong_word_lowers_its_own_score_and_that_of_the_prompt(word: str) -> None:
    sizes = {"name": 128, "style": 2, "background": len(BACKGROUNDS)}
    asked = {"name": CAPTIONS.names, "style": CAPTIONS.styles, "background": CAPTIONS.backgrounds}
    asked[word] = torch.where(torch.arange(N) < N // 2, (asked[word] + 1) % sizes[word], asked[word])
    found = scores(IMAGES, EmojiCaptions(*asked.values()))
    for each in asked:
        assert found[each] == pytest.approx(0.5 if each == word else 1, abs=0.02), each
    assert found["prompt"] == pytest.approx(0.5, abs=0.02)


def test_the_background_is_the_colour_of_most_of_the_border() -> None:
    images = PALETTE[:, :, None, None].expand(-1, -1, 32, 32).to(torch.uint8).clone()
    other = PALETTE.roll(1, 0)[:, :, None, None].to(torch.uint8)
    images[:, :, 1:-1, 1:-1] = other  # all but the outermost ring
    images[:, :, :, 20:] = other  # 56 of its 124 pixels
    assert backgrounds_of(images).tolist() == list(range(len(BACKGROUNDS)))
    images[:, :, :, 12:] = other  # 72 of them
    assert backgrounds_of(images).roll(-1).tolist() == list(range(len(BACKGROUNDS)))


def test_the_strength_of_edges_in_closed_form() -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert edge_strength(image) == 0
    image[:, :, :, 16:] = 51
    assert edge_strength(image) == pytest.approx(math.sqrt(3) * 0.2 / 31), "one of 31 columns, three channels"
    diagonal = torch.eye(32).mul(255).to(torch.uint8)[None, None]
    corner, side = math.sqrt(2) * 31, 2 * 30  # on the diagonal; beside it
    assert edge_strength(diagonal) == pytest.approx((corner + side) / 31**2)


def test_references_differ_in_their_captions_and_share_the_classifier() -> None:
    found = {name: references(name) for name in SPLITS}
    assert len({each.network.sha256 for each in found.values()}) == 1
    assert len({each.sha256 for each in [*found.values(), references("emoji", "train")]}) == 4
    texts = [set(each.captions.texts) for each in found.values() if each.captions is not None]
    assert sum(map(len, texts)) == len(set.union(*texts)) == len(EmojiCaptions.all())
    assert texts[0] == set(EmojiCaptions.of("train").texts)
    assert len(REFERENCE.features) == 4_000
    assert not REFERENCE.features.equal(references("emoji", "train").features), "validation sees other renders"


def test_renders_are_a_function_of_their_purpose_whatever_their_number() -> None:
    some = renders(CAPTIONS, "a")
    assert some.equal(renders(CAPTIONS, "a"))
    assert not some.equal(renders(CAPTIONS, "b"))
    many = renders(CAPTIONS.select(torch.zeros(1_200, dtype=torch.int64)), "a")
    assert len(many.flatten(1).unique(dim=0)) == 1_200, "every image is placed anew"


def test_the_bundled_model_is_scored_on_its_captions(tmp_path: Path) -> None:
    """32 samples with guidance show what their captions describe; another seed gives others."""
    command = ["eval", "emoji", "--steps", "4", "--guidance", "2", "--n", "32", "--device", "cpu"]
    succeeds(*command, "--json", tmp_path / "a.json")
    succeeds(*command, "--reference", "emoji-background", "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert {score["reference"] for score in found} == {"emoji/test", "emoji-background/test"}
    prompts = [score for score in found if score["metric"] == "prompt"]
    assert len(prompts) == 2
    assert all(score["value"] > 0.75 and score["nfe"] == 8 for score in prompts)
    assert {score["metric"] for score in found} == {
        "fd_emoji", "kid", "precision", "recall", "prompt", "name", "style", "background", "sharpness"
    }  # fmt: skip


def test_models_and_references_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evaluator = ReferenceEvaluator(REFERENCE, 9, (0,))
    model = load_model("emoji")
    with pytest.raises(UserError, match="n must be at least 10"):
        evaluator.check(model)
    vocabulary = model.config.vocabulary
    assert vocabulary is not None
    few = vocabulary.model_copy(update={"words": vocabulary.words[:-1]})
    with pytest.raises(UserError, match="does not know the word 'heart'"):
        REFERENCE.require_fit(model.config.model_copy(update={"vocabulary": few}))
    assert "has no captions" in refused(
        capsys, "eval", "emoji", "--reference", grey_reference(tmp_path), "--n", 20, "--device", "cpu"
    )
    assert "need uint8 images" in refused(capsys, "eval", "emoji", "--reference", "fashion", "--device", "cpu")
    assert "did you mean 'emoji-style'" in refused(capsys, "eval", "emoji", "--reference", "emoji-styl")


def grey_reference(folder: Path) -> Path:
    """A reference of images of the emoji's shape, but without captions."""
    images, out = folder / "images", folder / "reference"
    images.mkdir()
    for k, image in enumerate(IMAGES[:10]):
        fewstep.save_grid(image[None], images / f"{k}.png", columns=1, scale=1, gap=0)
    succeeds("data", "reference", images, "--out", out, "--network", "random")
    return out


def test_validation_is_the_distance_of_samples_for_the_captions(tmp_path: Path) -> None:
    model = load_model("emoji")
    sampling = SamplingConfig("euler", 2, 2.0)
    reference = references("emoji", "train")
    found = Validation(sampling, 24, reference, tmp_path)(model.denoiser, model.config, 7)
    texts = shuffled(EmojiCaptions.of("train")).texts[:24]
    images = fewstep.sample(model, prompts=texts, sampling=SamplingConfig("euler", 2, 2.0, seed=SEED))
    features = extract_features(reference.network, images)
    assert found == pytest.approx(frechet_distance(Statistics.of(features), reference.statistics), rel=1e-4)
    assert (tmp_path / "samples" / "step-0000007.png").is_file()
