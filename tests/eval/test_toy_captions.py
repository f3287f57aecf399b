"""Tinted garments: images show what their captions describe, and their contents are recovered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fewstep
from fewstep.distill.config_files import find_config
from fewstep.eval.networks.features import ClassifierFeatures, extract_features
from fewstep.eval.references import real_images
from fewstep.eval.toy_captions import GARMENTS, NAMES, PALETTE, CaptionSet, prompt_following, read_back, tint
from fewstep.samplers.plan import SamplingConfig

GREY, LABELS = real_images("fashion")
CAPTIONS = CaptionSet.sample(LABELS, torch.Generator().manual_seed(0))
IMAGES = tint(GREY, CAPTIONS)
NETWORK = ClassifierFeatures.load()


def test_a_caption_names_colour_garment_and_background() -> None:
    captions = CaptionSet(torch.tensor([7]), torch.tensor([NAMES.index("red")]), torch.tensor([NAMES.index("blue")]))
    assert captions.captions == ["a red sneaker on blue"]
    all_captions = CaptionSet.all().captions
    assert len(set(all_captions)) == len(all_captions) == len(GARMENTS) * len(NAMES) * (len(NAMES) - 1)
    assert (CAPTIONS.garments != CAPTIONS.backgrounds).all()


def test_black_becomes_the_background_and_white_the_garment() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    captions = CaptionSet(torch.tensor([0, 0]), torch.tensor([2, 2]), torch.tensor([5, 5]))
    images = tint(ends, captions)
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images[0, :, 16, 16].float(), PALETTE[5])
    assert torch.equal(images[1, :, 16, 16].float(), PALETTE[2])
    assert torch.equal(images[1, :, 0, 0].float(), PALETTE[5])


def test_the_contents_of_real_images_are_recovered() -> None:
    """Colours without errors, garments as accurately as the classifier recognises the grey images."""
    shown = read_back(IMAGES)
    assert torch.equal(shown.garments, CAPTIONS.garments)
    assert torch.equal(shown.backgrounds, CAPTIONS.backgrounds)
    assert (shown.grey.float() - GREY.float()).abs().max() <= 4
    scores = prompt_following(NETWORK, IMAGES, CAPTIONS)
    accuracy = (NETWORK.classes(extract_features(NETWORK, GREY)) == LABELS).float().mean().item()
    assert scores["colour"] == scores["background"] == 1
    assert scores["garment"] == pytest.approx(accuracy, abs=0.005)
    assert scores["prompt"] == scores["garment"]


@pytest.mark.parametrize(
    ("part", "wrong"), [("garments", "colour"), ("backgrounds", "background"), ("labels", "garment")]
)
def test_each_part_of_a_prompt_is_checked_separately(part: str, wrong: str) -> None:
    count = len(GARMENTS) if part == "labels" else len(NAMES)
    captions = replace(CAPTIONS, **{part: (getattr(CAPTIONS, part) + 1) % count})
    scores = prompt_following(NETWORK, IMAGES, captions)
    assert scores[wrong] < 0.1
    assert scores["prompt"] < 0.1
    assert all(value > 0.9 for name, value in scores.items() if name not in (wrong, "prompt"))


def test_noise_does_not_change_the_recovered_colours() -> None:
    noise = 15 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1))
    scores = prompt_following(NETWORK, (IMAGES + noise).clamp(0, 255).to(torch.uint8), CAPTIONS)
    assert min(scores["colour"], scores["background"]) > 0.98


def test_the_bundled_text_teacher_follows_its_prompts() -> None:
    """One image for every eighteenth caption: all ten garments and nine colours."""
    pytest.importorskip("diffusers")
    captions = CaptionSet.all().select(torch.arange(0, len(CaptionSet.all()), 18))
    images = fewstep.sample("fashion-text", prompts=captions.captions, sampling=SamplingConfig("unipc_2", 8, 2.0))
    scores = prompt_following(NETWORK, images, captions)
    assert scores["background"] > 0.95
    assert scores["colour"] > 0.8
    assert scores["garment"] > 0.8


def test_the_bundled_captions_are_all_of_them() -> None:
    assert find_config("configs/fashion_text/demo.yaml").with_name("captions.txt").read_text().splitlines() == (
        CaptionSet.all().captions
    )
