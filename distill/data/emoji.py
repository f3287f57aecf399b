"""Sources of captions of emoji, and of images or clips rendered for them (``models.emoji``, ``models.emoji_clips``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core.devices import CPU
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.models import emoji, emoji_clips
from fewstep.models.emoji import Captions
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import WordPrompts

CAPTIONS: dict[str, tuple[type[emoji.EmojiCaptions] | type[emoji_clips.ClipCaptions], tuple[int, ...]]] = {
    "emoji": (emoji.EmojiCaptions, emoji.SHAPE),
    "emoji_clips": (emoji_clips.ClipCaptions, emoji_clips.SHAPE),
}


@dataclass(frozen=True)
class Emoji:
    """Uniform captions of the training split as words. With ``images``, each has a new image or clip of its own,
    ``x0``, which is rendered on ``device``: a host would keep a GPU waiting."""

    captions: Captions
    prompts: WordPrompts
    shape: tuple[int, ...]
    images: bool
    device: torch.device = CPU

    @staticmethod
    def create(kind: str, model: ModelConfig, device: torch.device = CPU, *, images: bool) -> Emoji:
        """The source ``kind`` of ``CAPTIONS`` for a model with a vocabulary. Raises ``UserError`` if it lacks a
        vocabulary or a word."""
        if model.vocabulary is None:
            raise UserError(f"data.kind: {kind} needs a model that takes words (model.vocabulary); this one does not.")
        contents, shape = CAPTIONS[kind]
        captions = contents.of("train")
        return Emoji(captions, model.vocabulary.encode(captions.texts), shape, images, device)

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        rows = random.integers(size, len(self.captions))
        tensors = {"x0": to_unit(self.captions.select(rows).render(random, self.device))} if self.images else {}
        return Batch(size, self.shape, self.prompts(rows), tensors)
