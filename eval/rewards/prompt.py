"""How well an image of a coloured garment shows what its caption describes (``eval/toy_captions.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.rewards.confidence import confidence
from fewstep.eval.toy_captions import CaptionSet, read_back


def prompt(network: ClassifierFeatures, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The probability of the caption's garment by the evaluator's classifier [N], where both colours are the caption's,
    and 0 where one is not. ``images`` are uint8 [N, 3, 32, 32]; raises ``UserError`` on others, and on a caption of
    another form."""
    captions, shown = CaptionSet.parse(prompts), read_back(images)
    colours = (shown.garments == captions.garments) & (shown.backgrounds == captions.backgrounds)
    return torch.where(colours, confidence(network, shown.grey, captions.labels).exp(), 0.0)
