"""Scores of emoji generated for captions such as "a shiny fox on blue", and the renders that they are compared with.

Every word of a caption can be checked: a classifier of drawings (``reference/emoji``, made by
``benchmarks/make_emoji_reference.py``) finds name and style, and the colour of the border is the background. The real
images are rendered where they are needed, so that a reference is its classifier and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.files import sha256
from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.hashes import json_sha256
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.models.emoji import ART, PALETTE, SIDE, STYLES, EmojiCaptions, Split

# Names of references: all have one classifier, and differ in the captions of their renders.
SPLITS: dict[str, Split] = {"emoji": "train", "emoji-background": "background", "emoji-style": "style"}
RENDERS, PART = 4_000, 500  # real images of a reference; rendered at a time


def random_order(n: int) -> Tensor:
    """The numbers from 0 to n - 1 in one fixed random order, so that the first of them are a random choice."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def shuffled_captions(split: Split) -> EmojiCaptions:
    """All captions of a split in ``random_order``."""
    captions = EmojiCaptions.of(split)
    return captions.select(random_order(len(captions)))


def in_turn(captions: EmojiCaptions, n: int) -> EmojiCaptions:
    """``n`` captions, from the first again after the last."""
    return captions.select(torch.arange(n) % len(captions))


def renders(captions: EmojiCaptions, purpose: str) -> Tensor:
    """A new image for each caption, uint8 [N, 3, 32, 32], whose placements are a function of ``purpose``."""
    random = KeyedRandom(0, 0, purpose, 0)
    parts = torch.arange(len(captions)).split(PART)
    return torch.cat([captions.select(part).render(random) for part in parts])


def renders_sha256(split: Split, purpose: str) -> str:
    """Identifies ``RENDERS`` renders of a split's captions in turn by what they are made from."""
    return json_sha256([sha256(ART), split, purpose, RENDERS])


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
