"""Grey garments tinted into captioned pictures, "a red sneaker on blue", and the rule that reads a picture back.

A grey value g in [0, 1] becomes ``background + g (garment - background)``: the picture lies on the straight line
between two named colours, so that both colours and the grey garment can be recovered from it, and what a prompt asked
for can be checked without another network than the classifier of the grey images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.eval.networks.features import ClassifierFeatures, extract

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
    """What captions ask for: labels, garment colours and background colours, int64 [N] each (numbers of ``NAMES``)."""

    labels: Tensor
    garments: Tensor
    backgrounds: Tensor

    @property
    def captions(self) -> list[str]:
        return [
            f"a {NAMES[colour]} {GARMENTS[label]} on {NAMES[background]}"
            for label, colour, background in zip(
                self.labels.tolist(), self.garments.tolist(), self.backgrounds.tolist(), strict=True
            )
        ]

    @staticmethod
    def draw(labels: Tensor, generator: torch.Generator) -> CaptionSet:
        """Two different colours for each label."""
        n = len(labels)
        garments = torch.randint(len(NAMES), (n,), generator=generator)
        other = torch.randint(1, len(NAMES), (n,), generator=generator)
        return CaptionSet(labels, garments, (garments + other) % len(NAMES))

    @staticmethod
    def every() -> CaptionSet:
        """All of the different captions, in order."""
        n = len(NAMES)
        triples = [(k, c, b) for k in range(len(GARMENTS)) for c in range(n) for b in range(n) if c != b]
        return CaptionSet(*torch.tensor(triples).T)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Tensor) -> CaptionSet:
        return CaptionSet(self.labels[rows], self.garments[rows], self.backgrounds[rows])


def tint(grey: Tensor, asked: CaptionSet) -> Tensor:
    """uint8 [N, 1, 28, 28] -> uint8 [N, 3, 32, 32], with a border of the background."""
    edge = (SIDE - grey.shape[-1]) // 2
    g = F.pad(grey.float() / 255, (edge,) * 4)
    low, high = (PALETTE[rows][:, :, None, None] for rows in (asked.backgrounds, asked.garments))
    return (low + g * (high - low)).round().to(torch.uint8)


class TintedReading(NamedTuple):
    """What a picture shows: colours, int64 [N] each, and the grey garment between them, uint8 [N, 1, 28, 28]."""

    garments: Tensor
    backgrounds: Tensor
    grey: Tensor


def read(pictures: Tensor) -> TintedReading:
    """Reads uint8 [N, 3, 32, 32] back. The background is the colour nearest to the median of the two outermost pixels;
    the garment's is the one whose line from the background the inner pixels that differ most follow best."""
    x = pictures.float()
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
    # a line that is too long is not punished by distance from it, so its colour must be reached by the strongest pixels
    short = (length[:, :, 0] - along.topk(10, dim=2).values.mean(2)).clamp_min(0)
    cost = (across + beyond).mean(2) + 0.3 * short
    cost[torch.arange(len(x)), background] = float("inf")
    garment = cost.argmin(1)
    axis = lines[torch.arange(len(x)), garment]
    grey = (axis[:, None] @ inner)[:, 0] / axis.square().sum(1, keepdim=True).clamp_min(1e-6)
    return TintedReading(garment, background, (grey.clamp(0, 1) * 255).round().to(torch.uint8).view(-1, 1, 28, 28))


def following(network: ClassifierFeatures, pictures: Tensor, asked: CaptionSet) -> dict[str, float]:
    """Shares of pictures that show what their caption asked for: garment, its colour, the background, and all three."""
    seen = read(pictures)
    right = {
        "garment": network.classes(extract(network, seen.grey)).cpu() == asked.labels,
        "colour": seen.garments == asked.garments,
        "background": seen.backgrounds == asked.backgrounds,
    }
    right["prompt"] = right["garment"] & right["colour"] & right["background"]
    return {name: hits.float().mean().item() for name, hits in right.items()}
