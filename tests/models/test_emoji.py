"""The emoji: the art and its licences, captions and what is held out of training, and rendered images."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.models.emoji import (
    ANGLE,
    ART,
    BACKGROUNDS,
    PALETTE,
    SCALE,
    SHIFT,
    STYLES,
    EmojiCaptions,
    draw,
    load_art,
    placements,
)

NAMES, DRAWINGS = load_art()
ALL = EmojiCaptions.all()
IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def pairs(captions: EmojiCaptions) -> Counter[tuple[int, int]]:
    """The number of captions of each name and style."""
    return Counter(zip(captions.names.tolist(), captions.styles.tolist(), strict=True))


def test_every_name_is_one_word_with_one_meaning() -> None:
    words = [*NAMES, *STYLES, *BACKGROUNDS, "a", "on"]
    assert len(NAMES) == 128
    assert len(set(words)) == len(words)
    assert all(word == word.lower() and word.replace("-", "").isalpha() for word in words)


def test_drawings_are_premultiplied_different_and_surrounded_by_nothing() -> None:
    colours, alpha = DRAWINGS[:, :, :3], DRAWINGS[:, :, 3:]
    assert DRAWINGS.shape == (128, 2, 4, 64, 64)
    assert (colours <= alpha + 1e-6).all()
    assert (alpha.mean((2, 3, 4)) > 0.15).all(), "an almost empty drawing"
    assert (alpha[..., [0, 0, -1, -1], [0, -1, 0, -1]] < 0.05).all(), "the corners should show the background"
    small = F.avg_pool2d(DRAWINGS.flatten(0, 1), 4).flatten(1)
    distances = torch.cdist(small, small) + 100 * torch.eye(len(small))
    assert distances.min() > 1.5, "two drawings look alike"


def test_drawings_are_the_cells_of_the_sheet_in_reading_order() -> None:
    with Image.open(ART) as sheet:
        for name in (0, 15, 16, 127):
            for style in range(2):
                corner = (128 * (name % 16) + 64 * style, 64 * (name // 16))
                cell = np.asarray(sheet.crop((*corner, corner[0] + 64, corner[1] + 64))).astype(np.float64) / 255
                expected = np.dstack([cell[:, :, :3] * cell[:, :, 3:], cell[:, :, 3:]])
                np.testing.assert_allclose(DRAWINGS[name, style].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_names_belong_to_their_drawings() -> None:
    """The mean colour of some drawings in both styles: which of red, green and blue is strongest."""
    colours = DRAWINGS[:, :, :3].mean((3, 4)) / DRAWINGS[:, :, 3].mean((2, 3))[:, :, None]
    for channel, names in enumerate(
        (["heart", "apple", "cherry"], ["frog", "cactus", "kiwi"], ["whale", "fish", "gem"])
    ):
        for name in names:
            assert (colours[NAMES.index(name)].argmax(1) == channel).all(), name


def test_the_art_is_small_and_comes_with_its_licences() -> None:
    assert ART.stat().st_size < 2_500_000
    notice = (ART.parent / "NOTICE").read_text()
    assert "Noto" in notice
    assert "Apache License 2.0" in notice
    assert "microsoft/fluentui-emoji" in notice
    licence = (ART.parent / "LICENSE-microsoft.txt").read_text()
    assert licence.startswith("MIT License\n\nCopyright (c) Microsoft Corporation.")
    assert "THE SOFTWARE IS PROVIDED" in licence


def test_backgrounds_differ_from_each_other_and_from_yellow() -> None:
    colours = torch.cat([PALETTE, torch.tensor([[255.0, 200.0, 50.0]])])
    assert (torch.cdist(colours, colours) + 1e3 * torch.eye(len(colours))).min() > 100


def test_captions_name_style_thing_and_background() -> None:
    texts = ALL.texts
    assert len(set(texts)) == len(texts) == 128 * 2 * 9
    fox = EmojiCaptions(
        *torch.tensor([[NAMES.index("fox")], [STYLES.index("shiny")], [list(BACKGROUNDS).index("blue")]])
    )
    assert fox.texts == ["a shiny fox on blue"]


def test_the_splits_divide_all_captions() -> None:
    texts = [text for split in ("train", "background", "style") for text in EmojiCaptions.of(split).texts]
    assert sorted(texts) == sorted(ALL.texts)


def test_two_backgrounds_of_each_drawing_are_held_out() -> None:
    train, background = EmojiCaptions.of("train"), EmojiCaptions.of("background")
    assert set(pairs(train).values()) == {7}
    assert set(pairs(background).values()) == {2}
    assert pairs(train).keys() == pairs(background).keys()
    counts = background.backgrounds.bincount()
    assert counts.max() - counts.min() <= 0.1 * counts.float().mean(), "some colours are held out more often"


def test_one_style_of_eight_names_is_held_out_and_the_other_one_is_not() -> None:
    style, train = EmojiCaptions.of("style"), EmojiCaptions.of("train")
    assert len(style.names.unique()) == 8
    assert set(pairs(style).values()) == {9}
    assert style.styles.float().mean() == 0.5
    trained = pairs(train)
    assert not trained.keys() & pairs(style).keys()
    assert all((name, 1 - drawn) in trained for name, drawn in pairs(style))


def test_an_unmoved_drawing_is_composed_with_its_background_and_averaged() -> None:
    captions = ALL.select(torch.tensor([5, 700, 2000]))
    art = DRAWINGS[captions.names, captions.styles]
    composed = 255 * art[:, :3] + (1 - art[:, 3:]) * PALETTE[captions.backgrounds][:, :, None, None]
    expected = composed.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    images = draw(captions, IDENTITY.expand(3, 2, 3))
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(images.float(), expected, atol=0.51, rtol=0)


def placed(random: KeyedRandom, n: int) -> dict[str, Tensor]:
    """What ``placements`` drew, recovered from the maps: how drawings are placed is the inverse of each."""
    maps = placements(random, n)
    inverse = maps[:, :, :2].double().inverse()
    mirror = inverse.det().sign()
    turned = inverse @ torch.diag_embed(torch.stack([mirror, torch.ones_like(mirror)], 1))
    return {
        "mirror": mirror,
        "scale": inverse.det().abs().sqrt(),
        "angle": torch.atan2(turned[:, 1, 0], turned[:, 0, 0]) * 180 / math.pi,
        "shift": (-inverse @ maps[:, :, 2:].double())[:, :, 0].flatten() / 2,
    }


def test_placements_are_uniform_in_their_ranges() -> None:
    found = placed(KeyedRandom(0, 0, "test", 0), 4000)
    assert abs(found["mirror"].mean()) < 0.05
    for name, low, high in (("angle", -ANGLE, ANGLE), ("shift", -SHIFT, SHIFT), ("scale", *SCALE)):
        share = (found[name] - low) / (high - low)
        assert share.min() > -1e-4, name
        assert share.max() < 1 + 1e-4, name
        for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):
            assert abs(share.quantile(quantile) - quantile) < 0.03, name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([[1.0, 0.0, -0.25], [0.0, 1.0, 0.0]], lambda image: image.roll(4, 2)),  # to the right by an eighth
        ([[1.0, 0.0, 0.0], [0.0, 1.0, -0.25]], lambda image: image.roll(4, 1)),  # downwards
        ([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], lambda image: image.flip(2)),
    ],
)
def test_maps_move_drawings(change: list[list[float]], expected: object) -> None:
    star = ALL.select(torch.tensor([ALL.texts.index("a flat star on black")]))
    (plain,), (moved,) = draw(star, IDENTITY[None]), draw(star, torch.tensor([change]))
    inside = (slice(None), slice(5, None), slice(5, None))
    difference = (moved[inside].float() - expected(plain)[inside].float()).abs()  # type: ignore[operator]
    assert difference.max() <= 1


def test_images_are_a_function_of_the_key() -> None:
    """Invariant 4: seed, step and shard decide, and not what was rendered before."""
    captions = ALL.select(torch.arange(0, 2304, 200))
    first = captions.render(KeyedRandom(1, 2, "data", 3))
    assert first.equal(captions.render(KeyedRandom(1, 2, "data", 3)))
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not first.equal(captions.render(KeyedRandom(key[0], key[1], "data", key[2])))


def test_the_rim_of_an_image_shows_its_background() -> None:
    images = ALL.render(KeyedRandom(0, 0, "test", 0)).float()
    rim = torch.cat([images[:, :, [0, -1]].flatten(2), images[:, :, 1:-1, [0, -1]].flatten(2)], 2)
    nearest = torch.cdist(rim.median(2).values, PALETTE).argmin(1)
    assert nearest.equal(ALL.backgrounds)
