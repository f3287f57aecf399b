"""Grey garments tinted by captions such as "a red sneaker on blue", and the rule that recovers them from an image.

A grey value g in [0, 1] becomes ``background + g (garment - background)``. The pixels lie on the straight line between
two named colours, so both colours and the grey garment can be recovered, and the classifier of the grey images is the
only network needed to check whether an image shows what its caption describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import ClassifierFeatures, extract_features

SIDE = 32
GARMENTS = (
    "t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
COLOURS = {
    "red": (230, 40, 40), "orange": (245, 145, 30), "yellow": (245, 225, 50), "green": (40, 170, 70),
    "cyan": (50, 205, 215), "blue": (40, 80, 220), "purple": (150, 60, 190), "white": (250, 250, 250),
    "black": (10, 10, 10),
}  # fmt: skip
NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)


@dataclass(frozen=True)
class CaptionSet:
    """The contents of captions, int64 [N] each: labels, garment and background colours (indices of ``NAMES``)."""

    labels: Tensor
    garments: Tensor
    backgrounds: Tensor

    @property
    def captions(self) -> list[str]:
        """The captions as text."""
        return [
            f"a {NAMES[colour]} {GARMENTS[label]} on {NAMES[background]}"
            for label, colour, background in zip(
                self.labels.tolist(), self.garments.tolist(), self.backgrounds.tolist(), strict=True
            )
        ]

    @staticmethod
    def sample(labels: Tensor, generator: torch.Generator) -> CaptionSet:
        """Two different random colours for each label [N]."""
        n = len(labels)
        garments = torch.randint(len(NAMES), (n,), generator=generator)
        other = torch.randint(1, len(NAMES), (n,), generator=generator)
        return CaptionSet(labels, garments, (garments + other) % len(NAMES))

    @staticmethod
    def all() -> CaptionSet:
        """All different captions, in order."""
        n = len(NAMES)
        triples = [(k, c, b) for k in range(len(GARMENTS)) for c in range(n) for b in range(n) if c != b]
        return CaptionSet(*torch.tensor(triples).T)

    @staticmethod
    def parse(captions: Sequence[str]) -> CaptionSet:
        """The contents of captions as text. Raises ``UserError`` that names one of another form."""
        numbers = {text: k for k, text in enumerate(CaptionSet.all().captions)}
        if unknown := next((text for text in captions if text not in numbers), None):
            raise UserError(
                f"{unknown!r} is not a caption of a coloured garment, such as 'a red sneaker on blue' "
                "(configs/fashion_text/captions.txt); for other captions choose another reward, such as symmetry."
            )
        return CaptionSet.all().select(torch.tensor([numbers[text] for text in captions]))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> CaptionSet:
        """The captions at ``indices`` [M]."""
        return CaptionSet(self.labels[indices], self.garments[indices], self.backgrounds[indices])


def tint(grey: Tensor, captions: CaptionSet) -> Tensor:
    """uint8 [N, 1, 28, 28] -> uint8 [N, 3, 32, 32], with a border of the background colour."""
    edge = (SIDE - grey.shape[-1]) // 2
    g = F.pad(grey.float() / 255, (edge,) * 4)
    low, high = (PALETTE[rows][:, :, None, None] for rows in (captions.backgrounds, captions.garments))
    return (low + g * (high - low)).round().to(torch.uint8)


class RecoveredImages(NamedTuple):
    """The contents of images: colours of garment and background, int64 [N], and grey garments, uint8 [N, 1, 28, 28]."""

    garments: Tensor
    backgrounds: Tensor
    grey: Tensor


def read_back(images: Tensor) -> RecoveredImages:
    """Recovers the contents of uint8 images [N, 3, 32, 32]. Raises ``UserError`` on images of another shape.

    The background is the colour nearest to the median of the two outermost rows and columns. The garment colour is the
    one whose line from the background fits the inner pixels that differ most from the background best.
    """
    if images.shape[1:] != (3, SIDE, SIDE):
        raise UserError(f"Coloured garments are 3 x {SIDE} x {SIDE}, got images of shape {list(images.shape[1:])}.")
    x = images.float()
    edge = (SIDE - 28) // 2
    frame = torch.ones(SIDE, SIDE, dtype=torch.bool)
    frame[edge:-edge, edge:-edge] = False
    background = (x[:, :, frame].median(2).values[:, None] - PALETTE).norm(dim=2).argmin(1)
    low = PALETTE[background][:, :, None]
    inner = x[:, :, edge:-edge, edge:-edge].flatten(2) - low  # [N, 3, 784]
    distance = inner.norm(dim=1)
    far = distance.topk(60, dim=1).indices[:, None].expand(-1, 3, -1)
    strong = inner.gather(2, far)  # [N, 3, 60]
    lines = PALETTE[None] - PALETTE[background][:, None]  # [N, K, 3]
    length = lines.norm(dim=2, keepdim=True).clamp_min(1e-6)
    along = (lines / length) @ strong  # [N, K, 60]
    across = (strong.square().sum(1)[:, None] - along.square()).clamp_min(0).sqrt()
    beyond = (along - length).clamp_min(0) + (-along).clamp_min(0)
    # the distance from a line does not penalise one that is too long: the strongest pixels must reach its end
    short = (length[:, :, 0] - along.topk(10, dim=2).values.mean(2)).clamp_min(0)
    cost = (across + beyond).mean(2) + 0.3 * short
    cost[torch.arange(len(x)), background] = float("inf")
    garment = cost.argmin(1)
    axis = lines[torch.arange(len(x)), garment]
    grey = (axis[:, None] @ inner)[:, 0] / axis.square().sum(1, keepdim=True).clamp_min(1e-6)
    return RecoveredImages(garment, background, (grey.clamp(0, 1) * 255).round().to(torch.uint8).view(-1, 1, 28, 28))


def prompt_following(network: ClassifierFeatures, images: Tensor, captions: CaptionSet) -> dict[str, float]:
    """The shares (0..1) of images that show their caption's garment, its colour, the background, and all three."""
    shown = read_back(images)
    correct = {
        "garment": network.classes(extract_features(network, shown.grey)).cpu() == captions.labels,
        "colour": shown.garments == captions.garments,
        "background": shown.backgrounds == captions.backgrounds,
    }
    correct["prompt"] = correct["garment"] & correct["colour"] & correct["background"]
    return {name: hits.float().mean().item() for name, hits in correct.items()}
