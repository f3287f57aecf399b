"""How well an image shows what its caption describes: of a coloured garment (``eval/toy_captions.py``) or an emoji, or
how well a clip of one does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval import clip_scores, emoji
from fewstep.eval.motion import read_motion
from fewstep.eval.networks.features import ClassifierFeatures, require_images
from fewstep.eval.rewards.confidence import confidence
from fewstep.eval.toy_captions import CaptionSet, read_back
from fewstep.models.emoji import EmojiCaptions
from fewstep.models.emoji_clips import ClipCaptions


def prompt(network: ClassifierFeatures, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The probability of the caption's garment, or of its emoji in its style, by the evaluator's classifier [N], where
    the colours are the caption's, and 0 where one is not. ``images`` are uint8 [N, 3, 32, 32]; raises ``UserError`` on
    others, and on a caption of another form.

    Of clips, uint8 [N, 8, 3, 32, 32], by the classifier of their reference: the mean over the frames of the probability
    of the caption's emoji, and 0 where the background or the motion is another."""
    if images.ndim == 5:
        return _prompt_of_clips(network, images, prompts)
    if network.name == emoji.FOLDER:
        require_images(network.name, images, network.shape)
        drawn = EmojiCaptions.parse(prompts)
        right = emoji.backgrounds_of(images) == drawn.backgrounds
        return torch.where(right, confidence(network, images, emoji.drawing_classes(drawn)).exp(), 0.0)
    captions, shown = CaptionSet.parse(prompts), read_back(images)
    colours = (shown.garments == captions.garments) & (shown.backgrounds == captions.backgrounds)
    return torch.where(colours, confidence(network, shown.grey, captions.labels).exp(), 0.0)


def _prompt_of_clips(network: ClassifierFeatures, clips: Tensor, prompts: Sequence[str]) -> Tensor:
    if network.name != clip_scores.NETWORK:
        raise UserError(
            f"The features {network.name!r} are of images, and the reward prompt rates clips by those of "
            f"{' or '.join(clip_scores.SPLITS)}: give --reference, or another reward."
        )
    captions, frames = ClipCaptions.parse(prompts), clips.shape[1]
    shown = clip_scores.shows_motion(reading := read_motion(clips.transpose(1, 2)), captions)
    shown &= reading.backgrounds == captions.backgrounds
    named = confidence(network, clips.flatten(0, 1), captions.names.repeat_interleave(frames)).exp()
    return torch.where(shown, named.reshape(-1, frames).mean(1), 0.0)
