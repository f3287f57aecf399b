"""How well an image shows what its caption describes: of a coloured garment (``eval/toy_captions.py``) or an emoji."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.eval import emoji
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.rewards.confidence import confidence
from fewstep.eval.toy_captions import CaptionSet, read_back
from fewstep.models.emoji import EmojiCaptions


def prompt(network: ClassifierFeatures, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The probability of the caption's garment, or of its emoji in its style, by the evaluator's classifier [N], where
    the colours are the caption's, and 0 where one is not. ``images`` are uint8 [N, 3, 32, 32]; raises ``UserError`` on
    others, and on a caption of another form."""
    if network.name == emoji.FOLDER:
        drawn = EmojiCaptions.parse(prompts)
        right = emoji.backgrounds_of(images) == drawn.backgrounds
        return torch.where(right, confidence(network, images, emoji.drawing_classes(drawn)).exp(), 0.0)
    captions, shown = CaptionSet.parse(prompts), read_back(images)
    colours = (shown.garments == captions.garments) & (shown.backgrounds == captions.backgrounds)
    return torch.where(colours, confidence(network, shown.grey, captions.labels).exp(), 0.0)
