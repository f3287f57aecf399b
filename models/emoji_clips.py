"""The data of the bundled model ``emoji-video``: captions such as "a shiny ghost jumping on red", and clips of eight
frames rendered for them.

48 drawings of ``models.emoji`` in the style shiny move in eight ways that are rendered, each of which can be measured
(``eval/motion.py``), or as their artists animated them (``alive``, ``bundled/emoji-video/clips.png`` from
``benchmarks/make_emoji_clips.py``). Some combinations are held out of training, to measure whether a model composes
words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.core.devices import CPU
from fewstep.core.files import reading
from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.transfer import send
from fewstep.models.emoji import (
    ANGLE,
    ART_SIDE,
    BACKGROUNDS,
    SHIFT,
    SIDE,
    STYLES,
    load_art,
    paint,
    parse_captions,
    placed_at,
    premultiplied,
)

ART = Path(__file__).parent / "bundled" / "emoji-video" / "clips.png"
FRAMES = 8
SHAPE = (3, FRAMES, SIDE, SIDE)
STYLE = "shiny"
MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "spinning", "jumping", "alive")
ALIVE = MOTIONS.index("alive")  # the last: those before are rendered
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
SPEED = (1.0, 1.5)  # pixels a frame, of the four directions
SMALL, LARGE = (0.45, 0.55), (0.85, 0.95)  # the sizes between which drawings grow and shrink
MOVING, WHOLE = (0.55, 0.7), (0.82, 0.98)  # sizes of drawings that move or spin; of those that stay
TURN = 45.0  # degrees a frame, clockwise, of spinning
JUMP = (7.0, 9.0)  # pixels, the height of a jump
Split = Literal["train", "background", "motion"]


class Animations(NamedTuple):
    """What moves, RGBA in [0, 1] with premultiplied alpha, [names, 1 + FRAMES, 4, 64, 64]: the still drawing, and the
    frames of its artist's animation; and the names."""

    names: tuple[str, ...]
    drawings: Tensor


@cache
def load_animations() -> Animations:
    """The drawings that ship with the package. Raises ``UserError`` if a file is damaged."""
    with reading(ART, "sheet of the animations"), Image.open(ART) as sheet:
        names = tuple(sheet.info["names"].split())
        side = sheet.width // FRAMES
        cells = np.asarray(sheet.convert("RGBA")).reshape(len(names), side, FRAMES, side, 4)
    frames = premultiplied(torch.from_numpy(cells.copy()).permute(0, 2, 4, 1, 3))
    large = F.interpolate(frames.flatten(0, 1), ART_SIDE, mode="bilinear").reshape(
        *frames.shape[:3], ART_SIDE, ART_SIDE
    )
    art = load_art()
    stills = art.drawings[[art.names.index(name) for name in names], STYLES.index(STYLE)]
    return Animations(names, torch.cat([stills[:, None], large], 1))


@cache
def _animations_on(device: torch.device) -> Tensor:
    return load_animations().drawings.to(device)


@dataclass(frozen=True)
class ClipCaptions:
    """The contents of captions, int64 [N] each: the numbers of names, motions and backgrounds."""

    names: Tensor
    motions: Tensor
    backgrounds: Tensor

    @staticmethod
    def all() -> ClipCaptions:
        """All different captions, in order of names, motions and backgrounds."""
        sizes = (len(load_animations().names), len(MOTIONS), len(BACKGROUNDS))
        return ClipCaptions(*torch.cartesian_prod(*(torch.arange(size) for size in sizes)).T)

    @staticmethod
    def of(split: Split) -> ClipCaptions:
        """The captions of one split of all. Held out of training (``train``) are one rendered motion of each name
        (``motion``), and of all other pairs one background that differs from pair to pair (``background``)."""
        every = ClipCaptions.all()
        motion = every.motions == every.names % ALIVE
        background = ~motion & ((every.backgrounds - 2 * every.names - every.motions) % len(BACKGROUNDS) == 0)
        held_out = {"motion": motion, "background": background, "train": ~motion & ~background}
        return every.select(held_out[split].nonzero()[:, 0])

    @staticmethod
    def parse(texts: Sequence[str]) -> ClipCaptions:
        """The contents of captions as text. Raises ``UserError`` that names one of another form."""
        return parse_captions(ClipCaptions.all(), texts)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: Tensor) -> ClipCaptions:
        """The captions at ``indices`` [M]."""
        return ClipCaptions(self.names[indices], self.motions[indices], self.backgrounds[indices])

    @property
    def texts(self) -> list[str]:
        """The captions as text."""
        names, backgrounds = load_animations().names, list(BACKGROUNDS)
        phrases = [f"moving {motion}" if motion in DIRECTIONS else motion for motion in MOTIONS]
        return [
            f"a {STYLE} {names[name]} {phrases[motion]} on {backgrounds[background]}"
            for name, motion, background in zip(
                self.names.tolist(), self.motions.tolist(), self.backgrounds.tolist(), strict=True
            )
        ]

    def render(self, random: KeyedRandom, device: torch.device = CPU) -> Tensor:
        """A clip for each caption, uint8 [N, 3, FRAMES, 32, 32] on ``device``, moved by the numbers of ``random``."""
        placed = send(paths(self.motions, random), device).flatten(0, 1)
        names, backgrounds = (x.repeat_interleave(FRAMES) for x in (self.names, self.backgrounds))
        frames = torch.where((self.motions == ALIVE)[:, None], 1 + torch.arange(FRAMES), 0).flatten()
        images = paint(_animations_on(device)[send(names, device), send(frames, device)], placed, backgrounds)
        return images.reshape(len(self), FRAMES, *images.shape[1:]).transpose(1, 2).contiguous()


def directions(motions: Tensor) -> Tensor:
    """The directions (x, y) of ``motions`` [N], float32 [N, 2]; 0 of those that stay in their place."""
    return torch.tensor([DIRECTIONS.get(motion, (0, 0)) for motion in MOTIONS], dtype=torch.float32)[motions]


def paths(motions: Tensor, random: KeyedRandom) -> Tensor:
    """Random placements of each frame's drawing for ``motions`` [N], float32 [N, FRAMES, 2, 3], as
    ``models.emoji.placed_at`` defines them. Half of the drawings are mirrored; the motion is not."""
    n = len(motions)

    def uniform(low: float, high: float, stream: str) -> Tensor:
        return random.uniform(n, low, high, f"clip/{stream}")[:, None]

    def of(*names: str) -> Tensor:
        return torch.isin(motions, torch.tensor([MOTIONS.index(name) for name in names]))[:, None]

    time = torch.arange(FRAMES, dtype=torch.float64) / (FRAMES - 1)  # 0 to 1
    small, large = uniform(*SMALL, "small"), uniform(*LARGE, "large")
    share = torch.where(of("shrinking"), 1 - time, time)
    scale = uniform(*WHOLE, "whole").expand(n, FRAMES)
    scale = torch.where(of(*DIRECTIONS, "spinning", "jumping"), uniform(*MOVING, "moving"), scale)
    scale = torch.where(of("growing", "shrinking"), small * (large / small) ** share, scale)

    travelled = uniform(*SPEED, "speed") * (FRAMES - 1) * (time - 0.5)  # pixels from the middle
    jumped = uniform(*JUMP, "jump") * (4 * time * (1 - time) - 0.5)
    x, y = directions(motions).double().T[:, :, None] * travelled
    y = torch.where(of("jumping"), -jumped, y)
    pixels = torch.stack([x + SIDE * uniform(-SHIFT, SHIFT, "x"), y + SIDE * uniform(-SHIFT, SHIFT, "y")], -1)
    turned = torch.where(of("spinning"), TURN * (FRAMES - 1) * time, 0.0)
    angle = torch.deg2rad(uniform(-ANGLE, ANGLE, "angle") + turned)
    mirror = torch.where(uniform(0, 1, "mirror") < 0.5, -1.0, 1.0).expand(n, FRAMES)
    return placed_at(angle, scale, 2 * pixels / SIDE, mirror)
