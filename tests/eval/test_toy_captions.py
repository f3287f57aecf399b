"""Tinted garments: pictures say what their captions ask for, and are read back without error."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.distill.config import find_config
from fewstep.eval.networks.features import ClassifierFeatures, extract
from fewstep.eval.references import real_images
from fewstep.eval.toy_captions import GARMENTS, NAMES, PALETTE, CaptionSet, following, read, tint

GREY, LABELS = real_images("fashion")
ASKED = CaptionSet.draw(LABELS, torch.Generator().manual_seed(0))
PICTURES = tint(GREY, ASKED)
NETWORK = ClassifierFeatures.load()


def test_a_caption_names_colour_garment_and_background() -> None:
    asked = CaptionSet(torch.tensor([7]), torch.tensor([NAMES.index("red")]), torch.tensor([NAMES.index("blue")]))
    assert asked.captions == ["a red sneaker on blue"]
    every = CaptionSet.every()
    assert len(set(every.captions)) == len(every.captions) == len(GARMENTS) * len(NAMES) * (len(NAMES) - 1)
    assert (ASKED.garments != ASKED.backgrounds).all()


def test_black_becomes_the_background_and_white_the_garment() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    asked = CaptionSet(torch.tensor([0, 0]), torch.tensor([2, 2]), torch.tensor([5, 5]))
    pictures = tint(ends, asked)
    assert pictures.shape == (2, 3, 32, 32)
    assert torch.equal(pictures[0, :, 16, 16].float(), PALETTE[5])
    assert torch.equal(pictures[1, :, 16, 16].float(), PALETTE[2])
    assert torch.equal(pictures[1, :, 0, 0].float(), PALETTE[5])


def test_real_pictures_are_read_back() -> None:
    """Colours without an error, garments as well as the classifier knows the grey images."""
    seen = read(PICTURES)
    assert torch.equal(seen.garments, ASKED.garments)
    assert torch.equal(seen.backgrounds, ASKED.backgrounds)
    assert (seen.grey.float() - GREY.float()).abs().max() <= 4
    scores = following(NETWORK, PICTURES, ASKED)
    known = (NETWORK.classes(extract(NETWORK, GREY)) == LABELS).float().mean().item()
    assert scores["colour"] == scores["background"] == 1
    assert scores["garment"] == pytest.approx(known, abs=0.005)
    assert scores["prompt"] == scores["garment"]


@pytest.mark.parametrize(
    ("part", "wrong"), [("garments", "colour"), ("backgrounds", "background"), ("labels", "garment")]
)
def test_each_part_of_a_prompt_is_checked_by_itself(part: str, wrong: str) -> None:
    from dataclasses import replace

    count = len(GARMENTS) if part == "labels" else len(NAMES)
    asked = replace(ASKED, **{part: (getattr(ASKED, part) + 1) % count})
    scores = following(NETWORK, PICTURES, asked)
    assert scores[wrong] < 0.1
    assert scores["prompt"] < 0.1
    assert all(value > 0.9 for name, value in scores.items() if name not in (wrong, "prompt"))


def test_noise_as_of_a_generator_does_not_confuse_the_colours() -> None:
    noise = 15 * torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(1))
    scores = following(NETWORK, (PICTURES + noise).clamp(0, 255).to(torch.uint8), ASKED)
    assert min(scores["colour"], scores["background"]) > 0.98


def test_the_embedded_teacher_does_as_it_is_told() -> None:
    """A picture for every eighteenth caption: all ten garments and nine colours."""
    pytest.importorskip("diffusers")
    asked = CaptionSet.every().rows(torch.arange(0, len(CaptionSet.every()), 18))
    pictures = fewstep.sample("fashion-text", prompts=asked.captions, solver="unipc_2", steps=8, guidance=2.0)
    scores = following(NETWORK, pictures, asked)
    assert scores["background"] > 0.95
    assert scores["colour"] > 0.8
    assert scores["garment"] > 0.8


def test_the_captions_that_ship_are_all_of_them() -> None:
    assert find_config("configs/fashion_text/demo.yaml").with_name("captions.txt").read_text().splitlines() == (
        CaptionSet.every().captions
    )
