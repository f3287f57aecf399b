"""Prompts as words: the text side of a model that needs no text encoder.

A prompt is the set of its words, in any order. A network receives their numbers, ``condition["words"]`` int64 [B, L],
in which 0 means that nothing is said; guidance compares with a prompt that says nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import punctuation
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.models.condition import Condition

Word = Annotated[str, Field(min_length=1, max_length=100)]


@dataclass(frozen=True)
class WordPrompts:
    """Prompts as the numbers of their words, int64 [N, L]: what ``hub.encoded.EncodedPrompts`` is to a pipeline."""

    words: Tensor

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, rows: Tensor) -> Condition:
        """The condition of the prompts with these numbers [B]."""
        return Condition({"words": self.words[rows]}, {"words": torch.zeros_like(self.words[0])})


class Vocabulary(BaseModel):
    """The ``words`` that a model knows, numbered from 1, and ``fillers`` such as "a" and "on", which may stand in a
    prompt and say nothing. A prompt has at most ``length`` different words besides fillers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    words: tuple[Word, ...] = Field(min_length=1, max_length=100_000)
    fillers: tuple[Word, ...] = Field((), max_length=1000)
    length: int = Field(ge=1, le=1000)

    @model_validator(mode="after")
    def _words(self) -> Self:
        every = [*self.words, *self.fillers]
        if wrong := next((word for word in every if split_words(word) != [word]), None):
            raise ValueError(f"{wrong!r} is not one word in lower case, without punctuation around it")
        if len(set(every)) < len(every):
            raise ValueError("words and fillers must differ from each other")
        return self

    def encode(self, prompts: Sequence[str]) -> WordPrompts:
        """At least one prompt. Case, order, repetitions and punctuation around words have no meaning.

        Raises ``UserError`` that names the words that are not in the vocabulary, or a prompt with too many.
        """
        numbers = {word: number for number, word in enumerate(self.words, start=1)} | dict.fromkeys(self.fillers, 0)
        encoded = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            words = dict.fromkeys(split_words(prompt))
            if unknown := next((word for word in words if word not in numbers), None):
                others = {word for text in prompts for word in split_words(text)} - {*numbers, unknown}
                more = ", ".join(map(repr, sorted(others)[:20])) + (", ..." if len(others) > 20 else "")
                raise UserError(
                    f"The model does not know the word {unknown!r} of the prompt {prompt!r}{nearest(unknown, numbers)}."
                    + (f" Nor does it know {more}, of other prompts." if others else "")
                )
            said = sorted(numbers[word] for word in words if numbers[word])
            if len(said) > self.length:
                raise UserError(f"The prompt {prompt!r} has {len(said)} words; the model takes at most {self.length}.")
            encoded[row, : len(said)] = torch.tensor(said, dtype=torch.int64)
        return WordPrompts(encoded)

    def shared_words(self, other: Vocabulary) -> tuple[list[int], list[int]]:
        """The numbers of the words that both have: here, and in ``other``."""
        theirs = {word: number for number, word in enumerate(other.words, start=1)}
        shared = [(number, theirs[word]) for number, word in enumerate(self.words, start=1) if word in theirs]
        return [ours for ours, _ in shared], [other for _, other in shared]


def split_words(prompt: str) -> list[str]:
    """The words of a prompt in lower case, without punctuation around them."""
    stripped = (part.strip(punctuation) for part in prompt.lower().split())
    return [word for word in stripped if word]
