"""Clips of emoji: their captions, what is held out, and that they move as their captions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.models.emoji import BACKGROUNDS, PALETTE, load_art
from fewstep.models.emoji_clips import FRAMES, JUMP, MOTIONS, SPEED, ClipCaptions, load_animations

ALL = ClipCaptions.all()
PIXELS = torch.arange(32.0) + 0.5


def clips_of(motion: str) -> Tensor:
    """Clips of all names, float32 [48, 3, 8, 32, 32], on black."""
    names = torch.arange(48)
    black = torch.full_like(names, list(BACKGROUNDS).index("black"))
    return (
        ClipCaptions(names, torch.full_like(names, MOTIONS.index(motion)), black)
        .render(KeyedRandom(5, 0, motion, 0))
        .float()
    )


def shapes(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centre (x, y) and the area of what is not black, [N, 8] each."""
    there = (clips.amax(1) > 60).float()
    area = there.sum((-2, -1))
    return (there * PIXELS).sum((-2, -1)) / area, (there * PIXELS[:, None]).sum((-2, -1)) / area, area


def test_captions_say_what_is_shown() -> None:
    assert len(ALL) == 48 * 9 * 9
    names = load_animations().names
    assert set(names) <= set(load_art().names)
    one = ClipCaptions(*torch.tensor([[names.index("ghost")], [MOTIONS.index("jumping")], [0]]))
    assert one.texts == ["a shiny ghost jumping on red"]
    left = ClipCaptions(*torch.tensor([[names.index("bee")], [MOTIONS.index("left")], [3]]))
    assert left.texts == ["a shiny bee moving left on blue"]


def test_what_is_held_out_can_be_composed_of_what_is_trained() -> None:
    train, motion, background = (set(ClipCaptions.of(split).texts) for split in ("train", "motion", "background"))
    assert len(train) + len(motion) + len(background) == len(train | motion | background) == len(ALL)
    assert len(motion) == 48 * 9
    assert not any("alive" in text for text in motion), "an artist's animation cannot be composed"
    seen, unseen = ClipCaptions.of("train"), ClipCaptions.of("motion")
    pairs, held_out = (set(zip(c.names.tolist(), c.motions.tolist(), strict=True)) for c in (seen, unseen))
    assert (len(pairs), len(held_out)) == (48 * 8, 48), "each name lacks one motion"
    assert pairs.isdisjoint(held_out)
    for part in (seen.motions, seen.backgrounds):
        assert part.bincount().min() > 0.8 * part.bincount().max()


def test_clips_are_a_function_of_the_key() -> None:
    captions = ALL.select(torch.arange(0, len(ALL), 300))
    first = captions.render(KeyedRandom(1, 2, "data", 3))
    assert (first.dtype, first.shape) == (torch.uint8, (13, 3, FRAMES, 32, 32))
    assert first.equal(captions.render(KeyedRandom(1, 2, "data", 3)))
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not first.equal(captions.render(KeyedRandom(key[0], key[1], "data", key[2])))


def test_the_rim_of_every_frame_shows_the_background() -> None:
    frames = ALL.render(KeyedRandom(0, 0, "test", 0)).float()
    rim = torch.cat([frames[..., 0, :], frames[..., -1, :], frames[..., 0], frames[..., -1]], -1).flatten(2)
    nearest = torch.cdist(rim.median(2).values, PALETTE).argmin(1)
    assert (nearest == ALL.backgrounds).float().mean() > 0.99


@pytest.mark.parametrize(("motion", "x", "y"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
def test_drawings_move_at_the_speed_of_their_word(motion: str, x: int, y: int) -> None:
    for centres, direction in zip(shapes(clips_of(motion))[:2], (x, y), strict=True):
        speed = (centres[:, 5] - centres[:, 2]) / 3  # in the middle, where none is cut
        assert speed.mean() == pytest.approx(direction * sum(SPEED) / 2, abs=0.12)
        assert direction == 0 or (direction * speed > 0.7).all()


@pytest.mark.parametrize(("motion", "sign"), [("growing", 1), ("shrinking", -1)])
def test_drawings_change_their_size(motion: str, sign: int) -> None:
    area = shapes(clips_of(motion))[2]
    assert ((area[:, 1:] - area[:, :-1]) * sign > 0).float().mean() > 0.97
    zoom = (area[:, -1] / area[:, 0]).log() / 2 * sign
    assert zoom.mean() == pytest.approx(0.58, abs=0.08), "log(.9 / .5)"


def test_jumps_go_up_and_come_down() -> None:
    y = shapes(clips_of("jumping"))[1]
    height = (y[:, 0] + y[:, -1]) / 2 - y[:, 3:5].mean(1)
    assert height.mean() == pytest.approx(sum(JUMP) / 2 * 48 / 49, abs=0.4), "frames 3 and 4 are 1/14 from the top"


def test_spinning_turns_an_eighth_a_frame_clockwise() -> None:
    """Turned back by two frames' quarter, each frame is the one before."""
    clips = clips_of("spinning")
    centre = torch.stack(shapes(clips)[:2], -1).mean(1).round().int()
    near = [clip[..., y - 9 : y + 9, x - 9 : x + 9] for clip, (x, y) in zip(clips, centre.tolist(), strict=True)]
    frames = torch.stack([clip for clip in near if clip.shape[-2:] == (18, 18)])
    clockwise, other = (
        (frames[:, :, 2:].rot90(quarter, (-2, -1)) - frames[:, :, :-2]).abs().mean() for quarter in (1, -1)
    )
    assert clockwise < 0.5 * other


def test_an_animation_is_its_artists() -> None:
    """Unlike a rendered motion, its frames are different drawings: frame k of one name differs from all others."""
    drawings = load_animations().drawings
    assert drawings.shape == (48, 1 + FRAMES, 4, 64, 64)
    changes = (drawings[:, 2:] - drawings[:, 1:-1]).abs().mean((1, 2, 3, 4))
    assert (changes > 0.015).all()
    still = (drawings[:, 0] - drawings[:, 1]).abs().mean()
    others = (drawings[:, 0] - drawings.roll(1, 0)[:, 1]).abs().mean()
    assert still < 0.5 * others, "the first frame looks like the still drawing of its own name"
    alive = clips_of("alive")
    assert ((alive[:, :, 1:] - alive[:, :, :-1]).abs().mean((1, 2, 3, 4)) > 1).all()
