"""The rule that reads motion back: on real clips, on drawn discs and bars with known motion, and its symmetries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.motion import (
    SPEED,
    MotionReading,
    ObjectTrack,
    background_colours,
    classify,
    jump_of,
    read_motion,
    track_object,
    velocity_of,
    zoom_of,
)
from fewstep.models.emoji import BACKGROUNDS, PALETTE
from fewstep.models.emoji_clips import ALIVE, DIRECTIONS, MOTIONS, ClipCaptions, load_animations

NAMES, NUMBER = list(MOTIONS), {name: k for k, name in enumerate(MOTIONS)}
ALL = ClipCaptions.all()
FRAME = torch.arange(8.0)
ZOOMS = {"growing": "shrinking", "shrinking": "growing"}


@pytest.fixture(scope="module")
def real() -> tuple[ClipCaptions, Tensor, MotionReading]:
    """540 clips of random captions, and what is read in them."""
    captions = ALL.select(torch.randperm(len(ALL), generator=torch.Generator().manual_seed(3))[:540])
    clips = captions.render(KeyedRandom(0, 0, "motion", 0))
    return captions, clips, read_motion(clips)


def share(reading: MotionReading, expected: Tensor) -> float:
    return (reading.motions == expected).float().mean().item()


def drawn(inside: Tensor, colour: int = 250, background: str = "blue") -> Tensor:
    """A clip, uint8 [1, 3, F, 32, 32], that is white ``inside`` [F, 32, 32]."""
    low = PALETTE[list(BACKGROUNDS).index(background)][:, None, None, None]
    return torch.where(inside, torch.tensor(float(colour)), low).to(torch.uint8)[None]


def discs(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Discs inside frames, bool [F, 32, 32]."""
    grid = torch.arange(32.0)
    distance = (grid[None, None] - x[:, None, None]).square() + (grid[None, :, None] - y[:, None, None]).square()
    return distance < radius[:, None, None].square()


def bars(angle: Tensor) -> Tensor:
    """A bar with a knob at one end, turned clockwise by ``angle`` [F] in degrees, bool [F, 32, 32]."""
    grid = torch.arange(32.0) - 15.5
    cosine, sine = (f(angle.deg2rad())[:, None, None] for f in (torch.cos, torch.sin))
    along = cosine * grid[None, None] + sine * grid[None, :, None]
    across = -sine * grid[None, None] + cosine * grid[None, :, None]
    return ((along.abs() < 9) & (across.abs() < 2)) | ((along - 5).square() + across.square() < 16)


# --- real clips -------------------------------------------------------------------------------------------------------


def test_nearly_all_real_clips_are_read_right(real: tuple[ClipCaptions, Tensor, MotionReading]) -> None:
    captions, _, reading = real
    assert share(reading, captions.motions) >= 0.98
    for motion, name in enumerate(NAMES):
        of_motion = captions.motions == motion
        assert (reading.motions[of_motion] == motion).float().mean() >= 0.95, name
    assert reading.backgrounds.equal(captions.backgrounds)


def test_the_animation_of_no_name_is_read_as_another_motion() -> None:
    names = torch.arange(len(load_animations().names)).repeat_interleave(4)
    captions = ClipCaptions(names, torch.full_like(names, ALIVE), (3 * torch.arange(len(names))) % 9)
    reading = read_motion(captions.render(KeyedRandom(1, 0, "motion", 0)))
    assert share(reading, captions.motions) >= 0.98, "the penguin waddles"
    assert reading.change.min() > 0.005


def test_real_speeds_are_those_that_were_drawn(real: tuple[ClipCaptions, Tensor, MotionReading]) -> None:
    captions, _, reading = real
    directions = torch.tensor([DIRECTIONS.get(motion, (0, 0)) for motion in MOTIONS])
    travelling = captions.motions < 4
    along = (reading.velocity * directions[captions.motions]).sum(1)[travelling]
    assert abs(along.mean() - 1.25) < 0.04
    assert abs(along.std() - 0.5 / math.sqrt(12)) < 0.03
    assert reading.velocity[captions.motions == NUMBER["jumping"]].abs().mean() < 0.1


# --- symmetries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "swapped"),
    [
        (4, {"left": "right", "right": "left"}),
        (3, {"up": "down", "down": "up"}),
        (2, {"left": "right", "right": "left", "up": "down", "down": "up"} | ZOOMS),
    ],
)  # fmt: skip
def test_flipped_clips_are_read_as_the_opposite_motion(
    real: tuple[ClipCaptions, Tensor, MotionReading], dimension: int, swapped: dict[str, str]
) -> None:
    """Mirrored, turned upside down (without jumps, which become falls), and played backwards."""
    captions, clips, _ = real
    kept = captions.motions != (NUMBER["jumping"] if dimension == 3 else -1)
    table = torch.tensor([NUMBER[swapped.get(name, name)] for name in NAMES])
    assert share(read_motion(clips.flip(dimension)[kept]), table[captions.motions][kept]) >= 0.97


def test_a_clip_turned_by_a_quarter_travels_in_the_turned_direction(
    real: tuple[ClipCaptions, Tensor, MotionReading],
) -> None:
    captions, clips, reading = real
    turned = read_motion(torch.rot90(clips, -1, (3, 4)))  # clockwise
    x, y = reading.velocity.T
    torch.testing.assert_close(turned.velocity, torch.stack([-y, x], 1), atol=1e-4, rtol=0)
    clockwise = {"left": "up", "up": "right", "right": "down", "down": "left"}
    travelling = captions.motions < 4
    table = torch.tensor([NUMBER[clockwise.get(name, name)] for name in NAMES])
    assert share(MotionReading(*(v[travelling] for v in turned)), table[captions.motions[travelling]]) >= 0.98


def test_a_still_clip_is_never_moving(real: tuple[ClipCaptions, Tensor, MotionReading]) -> None:
    _, clips, _ = real
    reading = read_motion(clips[:, :, 3:4].expand(-1, -1, 8, -1, -1))
    assert (reading.motions == ALIVE).all()
    for value in (reading.velocity, reading.zoom, reading.jump, reading.turn, reading.change):
        assert value.abs().max() < 1e-4


def test_an_empty_clip_is_read_without_a_number_that_is_not_finite() -> None:
    reading = read_motion(drawn(torch.zeros(8, 32, 32, dtype=torch.bool), background="pink"))
    assert reading.motions.tolist() == [ALIVE]
    assert reading.backgrounds.tolist() == [list(BACKGROUNDS).index("pink")]
    assert all(value.isfinite().all() for value in reading)
    some = torch.zeros(8, 32, 32, dtype=torch.bool)
    some[3:5, 10:20, 10:20] = True
    assert all(value.isfinite().all() for value in read_motion(drawn(some)))


# --- known motion -----------------------------------------------------------------------------------------------------


def test_quantities_of_discs_are_those_drawn() -> None:
    x, y, radius = 10 + 1.5 * FRAME, 16 - 0.5 * FRAME, torch.full((8,), 5.0)
    reading = read_motion(drawn(discs(x, y, radius)))
    torch.testing.assert_close(reading.velocity, torch.tensor([[1.5, -0.5]]), atol=0.08, rtol=0)
    assert reading.motions.tolist() == [NUMBER["right"]]
    radius = 3 * 1.16**FRAME
    reading = read_motion(drawn(discs(torch.full((8,), 15.5), torch.full((8,), 15.5), radius)))
    expected = math.log(float(radius[-2:].sum() / radius[:2].sum()))
    assert abs(reading.zoom.item() - expected) < 0.1
    assert reading.motions.tolist() == [NUMBER["growing"]]


@pytest.mark.parametrize("turn", [-90.0, -45.0, -30.0, 30.0, 45.0, 90.0, 120.0])
def test_turns_are_measured_without_their_sign(turn: float) -> None:
    reading = read_motion(drawn(bars(20 + turn * FRAME)))
    assert abs(reading.turn.item() - abs(turn)) <= 15
    assert reading.motions.tolist() == [NUMBER["spinning"]]


def test_turns_to_and_fro_do_not_cancel() -> None:
    angle = torch.tensor([0.0, 45, 45, 0, 0, 45, 45, 0])
    assert read_motion(drawn(bars(angle))).turn.item() >= 40


def test_noise_does_not_spin() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (40, 3, 8, 32, 32), generator=generator, dtype=torch.uint8)
    assert (read_motion(noise).motions == ALIVE).all()


def test_a_slight_sway_is_no_spin() -> None:
    reading = read_motion(drawn(bars(10 * (FRAME % 2))))
    assert reading.motions.tolist() == [ALIVE]
    assert reading.change.item() > 0


def test_the_least_squares_slope_is_exact_for_a_straight_line_and_ignores_a_jump() -> None:
    line = torch.stack([3 + 0.7 * FRAME, 20 - 1.1 * FRAME], 1)[None]
    jump = torch.stack([torch.full((8,), 5.0), 20 - 8 + 8 * ((FRAME - 3.5) / 3.5) ** 2], 1)[None]
    radius = torch.ones(1, 8)
    torch.testing.assert_close(velocity_of(ObjectTrack(line, radius)), torch.tensor([[0.7, -1.1]]))
    torch.testing.assert_close(velocity_of(ObjectTrack(jump, radius)), torch.zeros(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(jump_of(ObjectTrack(line, radius)), torch.zeros(1), atol=1e-5, rtol=0)
    expected = torch.tensor([8 * (1 - (0.5 / 3.5) ** 2)])
    torch.testing.assert_close(jump_of(ObjectTrack(jump, radius)), expected)


def test_zoom_is_the_log_of_the_ratio_of_radii() -> None:
    radius = torch.tensor([[2.0, 4, 9, 9, 9, 9, 5, 7]])
    torch.testing.assert_close(zoom_of(ObjectTrack(torch.zeros(1, 8, 2), radius)), torch.tensor([math.log(2.0)]))


def test_single_pixels_are_no_object() -> None:
    inside = discs(torch.full((8,), 12.0), torch.full((8,), 20.0), torch.full((8,), 5.0))
    clip = drawn(inside)
    noisy = drawn(inside | (torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.02))
    colour = background_colours(clip.float())
    (centre, radius), (noisy_centre, noisy_radius) = (track_object(c.float(), colour) for c in (clip, noisy))
    torch.testing.assert_close(centre, torch.tensor([12.0, 20.0]).expand_as(centre), atol=0.1, rtol=0)
    torch.testing.assert_close(radius, torch.full_like(radius, 5.0), atol=0.4, rtol=0)
    torch.testing.assert_close(noisy_centre, centre, atol=0.5, rtol=0)
    torch.testing.assert_close(noisy_radius, radius, atol=0.5, rtol=0)


def test_the_background_is_a_median_of_the_border() -> None:
    """An object that covers a part of the border in some frames does not change it."""
    inside = torch.zeros(8, 32, 32, dtype=torch.bool)
    inside[:5, :12, 5:25] = True
    clip = drawn(inside, background="green")
    assert background_colours(clip.float())[0].equal(PALETTE[list(BACKGROUNDS).index("green")])


@pytest.mark.parametrize(
    ("velocity", "zoom", "jump", "turn", "expected"),
    [
        ((1.0, 0.0), 0.5, 6.0, 45.0, "growing"),
        ((1.0, 0.0), -0.5, 6.0, 45.0, "shrinking"),
        ((1.0, 0.2), 0.3, 6.0, 45.0, "right"),
        ((-0.2, -1.0), 0.3, 6.0, 45.0, "up"),
        ((0.3, 0.3), 0.3, 6.0, 45.0, "jumping"),
        ((0.3, 0.3), 0.3, -6.0, 45.0, "spinning"),
        ((0.3, 0.3), 0.3, 3.0, 24.0, "alive"),
    ],
)
def test_the_rule_asks_in_order(
    velocity: tuple[float, float], zoom: float, jump: float, turn: float, expected: str
) -> None:
    values = (torch.tensor([velocity]), torch.tensor([zoom]), torch.tensor([jump]), torch.tensor([turn]))
    assert NAMES[int(classify(*values))] == expected
    slow = classify(torch.tensor([[0.9 * SPEED, 0.0]]), *(torch.zeros(1) for _ in range(3)))
    assert slow.tolist() == [ALIVE]


@pytest.mark.parametrize(
    "clips",
    [torch.zeros(2, 3, 8, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
     torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 1, 8, 32, 32, dtype=torch.uint8),
     torch.zeros(0, 3, 8, 32, 32, dtype=torch.uint8)],
)  # fmt: skip
def test_what_is_no_clip_is_refused(clips: Tensor) -> None:
    with pytest.raises(UserError, match="clips"):
        read_motion(clips)
