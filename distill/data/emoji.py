"""A source of captions of emoji, and of images rendered for them (``models.emoji``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core.devices import CPU
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.models.emoji import SHAPE, EmojiCaptions, render
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import WordPrompts


@dataclass(frozen=True)
class Emoji:
    """Uniform captions of the training split as words. With ``images``, each has a new image of its own, ``x0``, which
    is rendered on ``device``: a host would keep a GPU waiting."""

    captions: EmojiCaptions
    prompts: WordPrompts
    images: bool
    device: torch.device = CPU

    @staticmethod
    def create(model: ModelConfig, device: torch.device = CPU, *, images: bool) -> Emoji:
        """The source for a model with a vocabulary. Raises ``UserError`` if it lacks a vocabulary or a word."""
        if model.vocabulary is None:
            raise UserError("data.kind: emoji needs a model that takes words (model.vocabulary); this one does not.")
        captions = EmojiCaptions.of("train")
        return Emoji(captions, model.vocabulary.encode(captions.texts), images, device)

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        rows = random.integers(size, len(self.captions))
        tensors = {"x0": to_unit(render(self.captions.select(rows), random, self.device))} if self.images else {}
        return Batch(size, SHAPE, self.prompts(rows), tensors)
