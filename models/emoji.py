"""The data of the bundled model ``emoji``: captions such as "a shiny fox on blue", and images rendered for them.

128 drawings in two styles (``bundled/emoji/art.png``, from ``benchmarks/make_emoji_art.py``) are placed at random on
nine backgrounds. Every word of a caption is visible: the styles are two artists' drawings of one thing. Some
combinations are held out of training, to measure whether a model composes words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.core.devices import CPU
from fewstep.core.errors import UserError
from fewstep.core.files import reading
from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.transfer import send

ART = Path(__file__).parent / "bundled" / "emoji" / "art.png"
SIDE, ART_SIDE = 32, 64
SHAPE = (3, SIDE, SIDE)
STYLES = ("flat", "shiny")
BACKGROUNDS = {
    "red": (205, 30, 45), "green": (20, 125, 65), "cyan": (70, 205, 215), "blue": (30, 70, 205),
    "purple": (130, 30, 190), "pink": (250, 150, 200), "white": (248, 248, 248), "grey": (125, 125, 130),
    "black": (15, 15, 20),
}  # all far from the yellow of most faces  # fmt: skip
PALETTE = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
ANGLE, SHIFT, SCALE = 10.0, 0.06, (0.82, 0.98)  # degrees either way; share of the image either way; size in the image
Split = Literal["train", "background", "style"]


class Art(NamedTuple):
    """The drawings, RGBA in [0, 1] with premultiplied alpha, [names, styles, 4, 64, 64], and their names."""

    names: tuple[str, ...]
    drawings: Tensor


@cache
def load_art() -> Art:
    """The drawings that ship with the package. Raises ``UserError`` if the file is damaged."""
    with reading(ART, "sheet of the emoji"), Image.open(ART) as sheet:
        names = tuple(sheet.info["names"].split())
        cells = np.asarray(sheet.convert("RGBA")).reshape(-1, ART_SIDE, sheet.width // ART_SIDE, ART_SIDE, 4)
    drawings = premultiplied(torch.from_numpy(cells.copy()).permute(0, 2, 4, 1, 3))
    return Art(names, drawings.reshape(len(names), len(STYLES), 4, ART_SIDE, ART_SIDE))


def premultiplied(pixels: Tensor) -> Tensor:
    """RGBA, uint8 [..., 4, H, W], in [0, 1] and with colours multiplied by their opacity."""
    colours, alpha = (pixels.float() / 255).split([3, 1], -3)
    return torch.cat([colours * alpha, alpha], -3)


@cache
def _drawings_on(device: torch.device) -> Tensor:
    return load_art().drawings.to(device)


class Captions(Protocol):
    """The contents of captions, and images or clips rendered for them."""

    def __len__(self) -> int: ...

    @property
    def texts(self) -> list[str]: ...

    def select(self, indices: Tensor) -> Self: ...

    def render(self, random: KeyedRandom, device: torch.device = CPU) -> Tensor: ...


C = TypeVar("C", bound=Captions)


def parse_captions(every: C, texts: Sequence[str]) -> C:
    """Those of ``every`` caption that have these texts. Raises ``UserError`` that names a text of another form."""
    known = every.texts
    numbers = {text: k for k, text in enumerate(known)}
    if unknown := [text for text in texts if text not in numbers]:
        raise UserError(f"{unknown[0]!r} is not a caption of an emoji, such as {known[0]!r}.")
    return every.select(torch.tensor([numbers[text] for text in texts], dtype=torch.int64))


@dataclass(frozen=True)
class EmojiCaptions:
    """The contents of captions, int64 [N] each: the numbers of names, styles and backgrounds."""

    names: Tensor
    styles: Tensor
    backgrounds: Tensor

    @staticmethod
    def all() -> EmojiCaptions:
        """All different captions, in order of names, styles and backgrounds."""
        sizes = (len(load_art().names), len(STYLES), len(BACKGROUNDS))
        return EmojiCaptions(*torch.cartesian_prod(*(torch.arange(size) for size in sizes)).T)

    @staticmethod
    def of(split: Split) -> EmojiCaptions:
        """The captions of one split of all. Held out of training (``train``) are one style of every 16th name
        (``style``), and of all other drawings two backgrounds that differ from drawing to drawing (``background``)."""
        every = EmojiCaptions.all()
        style = (every.names % 16 == 0) & (every.styles == every.names // 16 % 2)
        turned = (every.backgrounds - 2 * every.names - every.styles) % len(BACKGROUNDS)
        background = ~style & ((turned == 0) | (turned == 4))
        held_out = {"style": style, "background": background, "train": ~style & ~background}
        return every.select(held_out[split].nonzero()[:, 0])

    @staticmethod
    def parse(texts: Sequence[str]) -> EmojiCaptions:
        """The contents of captions as text. Raises ``UserError`` that names one of another form."""
        return parse_captions(EmojiCaptions.all(), texts)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: Tensor) -> EmojiCaptions:
        """The captions at ``indices`` [M]."""
        return EmojiCaptions(self.names[indices], self.styles[indices], self.backgrounds[indices])

    @property
    def texts(self) -> list[str]:
        """The captions as text."""
        names, backgrounds = load_art().names, list(BACKGROUNDS)
        return [
            f"a {STYLES[style]} {names[name]} on {backgrounds[background]}"
            for name, style, background in zip(
                self.names.tolist(), self.styles.tolist(), self.backgrounds.tolist(), strict=True
            )
        ]

    def render(self, random: KeyedRandom, device: torch.device = CPU) -> Tensor:
        """An image for each caption, uint8 [N, 3, 32, 32] on ``device``, placed by the numbers of ``random``."""
        return draw(self, send(placements(random, len(self)), device))


def placements(random: KeyedRandom, n: int) -> Tensor:
    """Random placements of drawings, float32 [n, 2, 3]: the maps from positions in the image to positions in the
    drawing, as ``torch.nn.functional.affine_grid`` takes them. Half of the drawings are mirrored."""
    angle = random.uniform(n, -math.radians(ANGLE), math.radians(ANGLE), "emoji/angle")
    scale = random.uniform(n, *SCALE, "emoji/scale")
    shift = 2 * random.uniform(2 * n, -SHIFT, SHIFT, "emoji/shift").reshape(n, 2)  # positions are in [-1, 1]
    mirror = torch.where(random.uniform(n, stream="emoji/mirror") < 0.5, -1.0, 1.0)
    return placed_at(angle, scale, shift, mirror)


def placed_at(angle: Tensor, scale: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """The maps of ``placements``, float32 [..., 2, 3], for drawings turned clockwise by ``angle`` (radians), of the
    size ``scale`` (a share of the image), moved by ``shift`` [..., 2] (x to the right and y down; 2 is the whole
    image), and mirrored before that where ``mirror`` is -1."""
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    turned = torch.stack([mirror * cosine, mirror * sine, -sine, cosine], -1).unflatten(-1, (2, 2))
    return torch.cat([turned, -turned @ shift[..., None]], -1).float()


def draw(captions: EmojiCaptions, placed: Tensor) -> Tensor:
    """An image for each caption, uint8 [N, 3, 32, 32] on the device of ``placed``, with its drawing placed as
    ``placements`` returns."""
    device = placed.device
    drawings = _drawings_on(device)[send(captions.names, device), send(captions.styles, device)]
    return paint(drawings, placed, captions.backgrounds)


def paint(drawings: Tensor, placed: Tensor, backgrounds: Tensor) -> Tensor:
    """Images, uint8 [N, 3, 32, 32], of ``drawings`` [N, 4, 64, 64] placed on ``backgrounds`` [N], drawn at 64 x 64 and
    averaged."""
    grid = F.affine_grid(placed, list(drawings.shape), align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(drawings, grid, align_corners=False), ART_SIDE // SIDE)
    colours, alpha = drawn[:, :3], drawn[:, 3:]
    images = 255 * colours + (1 - alpha) * send(PALETTE[backgrounds], drawings.device)[:, :, None, None]
    return images.round().clamp(0, 255).to(torch.uint8)
