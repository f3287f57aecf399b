"""Sources of captions of emoji, and of images or clips rendered for them (``models.emoji``, ``models.emoji_clips``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.devices import CPU
from fewstep.core.errors import UserError, nearest
from fewstep.core.image_files import to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.models import emoji, emoji_clips
from fewstep.models.emoji import Captions
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import WordPrompts, split_words

CAPTIONS: dict[str, tuple[type[emoji.EmojiCaptions] | type[emoji_clips.ClipCaptions], tuple[int, ...]]] = {
    "emoji": (emoji.EmojiCaptions, emoji.SHAPE),
    "emoji_clips": (emoji_clips.ClipCaptions, emoji_clips.SHAPE),
}


@dataclass(frozen=True)
class Emoji:
    """Random captions of the training split as words. With ``images``, each has a new image or clip of its own,
    ``x0``, which is rendered on ``device``: a host would keep a GPU waiting."""

    captions: Captions
    prompts: WordPrompts
    shape: tuple[int, ...]
    images: bool
    device: torch.device = CPU

    @staticmethod
    def create(
        kind: str,
        model: ModelConfig,
        device: torch.device = CPU,
        *,
        images: bool,
        repeat: Mapping[str, int] | None = None,
    ) -> Emoji:
        """The source ``kind`` of ``CAPTIONS`` for a model with a vocabulary. Captions with a word of ``repeat`` are so
        many times as frequent as others. Raises ``UserError`` if the model lacks a vocabulary or a word, or if none
        of the captions, or every one, has a word of ``repeat``."""
        if model.vocabulary is None:
            raise UserError(f"data.kind: {kind} needs a model that takes words (model.vocabulary); this one does not.")
        contents, shape = CAPTIONS[kind]
        captions = contents.of("train")
        captions = captions.select(repeated_rows(captions.texts, repeat or {}))
        return Emoji(captions, model.vocabulary.encode(captions.texts), shape, images, device)

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        rows = random.integers(size, len(self.captions))
        tensors = {"x0": to_unit(self.captions.select(rows).render(random, self.device))} if self.images else {}
        return Batch(size, self.shape, self.prompts(rows), tensors)


def repeated_rows(captions: Sequence[str], repeat: Mapping[str, int]) -> Tensor:
    """The numbers of ``captions``, those of captions with a word of ``repeat`` so many times, int64 [M]; of several
    such words the largest number counts."""
    times = torch.ones(len(captions), dtype=torch.int64)
    words = [set(split_words(caption)) for caption in captions]
    for word, factor in repeat.items():
        found = torch.tensor([word in each for each in words])
        if not found.any():
            raise UserError(
                f"data.repeat: no caption of the training split has the word {word!r}"
                f"{nearest(word, set().union(*words))}."
            )
        if found.all():
            raise UserError(
                f"data.repeat: every caption has the word {word!r}, so repeating does not act: leave it out."
            )
        times[found] = times[found].clamp_min(factor)
    return torch.arange(len(captions)).repeat_interleave(times)
