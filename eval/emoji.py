"""Scores of emoji generated for captions such as "a shiny fox on blue", and the renders that they are compared with.

Every word of a caption can be checked: a classifier of drawings (``reference/emoji``, made by
``benchmarks/make_emoji_reference.py``) finds name and style, and the colour of the border is the background. The real
images are rendered where they are needed, so that a reference is its classifier and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fewstep.core.files import sha256
from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.hashes import json_sha256
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.models.emoji import ART, PALETTE, SIDE, STYLES, Captions, EmojiCaptions, Split

# Names of references: all have one classifier, and differ in the captions of their renders.
SPLITS: dict[str, Split] = {"emoji": "train", "emoji-background": "background", "emoji-style": "style"}
FOLDER = "emoji"  # of the classifier, in reference/
C = TypeVar("C", bound=Captions)
RENDERS, PART = 4_000, 500  # real images of a reference; rendered at a time


def shuffled(captions: C) -> C:
    """Captions in one fixed random order, so that the first n are a random choice."""
    return captions.select(torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)))


def in_turn(captions: C, n: int) -> C:
    """``n`` captions, from the first again after the last."""
    return captions.select(torch.arange(n) % len(captions))


def renders(captions: Captions, purpose: str, part: int = PART) -> Tensor:
    """A new image or clip for each caption, whose placements are a function of ``purpose``; ``part`` at a time."""
    random = KeyedRandom(0, 0, purpose, 0)
    parts = torch.arange(len(captions)).split(part)
    return torch.cat([captions.select(rows).render(random) for rows in parts])


def real_set(name: str, purpose: str) -> tuple[EmojiCaptions, Tensor, str]:
    """The captions of a reference of ``SPLITS``, renders of them in turn, uint8 [RENDERS, 3, 32, 32], and a hash of
    what these are made from."""
    captions = shuffled(EmojiCaptions.of(SPLITS[name]))
    return captions, renders(in_turn(captions, RENDERS), purpose), made_from(ART, SPLITS[name], purpose, RENDERS)


def made_from(art: Path, split: str, purpose: str, n: int) -> str:
    """Identifies ``n`` renders of a split's captions in turn by what they are made from."""
    return json_sha256([sha256(art), split, purpose, n])


def drawing_classes(captions: EmojiCaptions) -> Tensor:
    """The classes [N] of the classifier: drawings, that is names in a style."""
    return captions.names * len(STYLES) + captions.styles


def backgrounds_of(images: Tensor) -> Tensor:
    """The background, int64 [N], of images uint8 [N, 3, 32, 32]: the colour of ``PALETTE`` nearest to the median of the
    outermost ring of pixels."""
    ring = torch.ones(SIDE, SIDE, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    border = images[:, :, ring].float().median(2).values
    return torch.cdist(border, PALETTE).argmin(1)


def edge_strength(images: Tensor) -> float:
    """The mean length of the gradient (differences to the pixels on the right and below, all channels) of images,
    uint8 [N, C, H, W], in units of their range."""
    x = images.float() / 255
    right, down = x[:, :, :-1, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, :-1]
    return (right.square() + down.square()).sum(1).sqrt().mean().item()


def caption_scores(
    network: ClassifierFeatures, features: Tensor, images: Tensor, captions: EmojiCaptions
) -> dict[str, float]:
    """The shares (0..1) of images, uint8 [N, 3, 32, 32] with their ``features`` [N, D], that show their caption's name,
    style and background, and all three (``prompt``)."""
    drawn = network.classes(features)
    correct = {
        "name": drawn // len(STYLES) == captions.names,
        "style": drawn % len(STYLES) == captions.styles,
        "background": backgrounds_of(images) == captions.backgrounds,
    }
    shares = {"prompt": torch.stack(list(correct.values())).all(0), **correct}
    return {name: hits.float().mean().item() for name, hits in shares.items()}
