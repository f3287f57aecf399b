"""Sources of batches: labels, words, images, stored samples, encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.image_data import ImageTable
from fewstep.core.image_files import to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.models.condition import Condition, LabelRows
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.vocabulary import WordPrompts


@dataclass(frozen=True)
class Labels:
    """Uniform class labels: all that a data-free method needs for a class-conditional teacher; none for 0 classes."""

    classes: int
    shape: tuple[int, ...]

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        labels = random.integers(size, max(1, self.classes))
        return Batch(size, self.shape, Condition.of_labels(labels, self.classes))


@dataclass(frozen=True)
class Words:
    """Uniform prompts of words: all that a data-free method needs for a model with a vocabulary."""

    prompts: WordPrompts
    shape: tuple[int, ...]

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        return Batch(size, self.shape, self.prompts(random.integers(size, len(self.prompts))))


@dataclass(frozen=True)
class Images:
    """A set of images with their labels or prompts, sampled with replacement; ``x0`` is float32 in [-1, 1]. With
    ``flip``, each sample is mirrored with probability 1/2."""

    table: ImageTable
    conditions: LabelRows | WordPrompts
    flip: bool = False

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        rows = random.integers(size, len(self.table))
        pixels, _ = self.table[rows]
        if self.flip:
            mirrored = random.uniform(size, stream="flip") < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return Batch(size, self.table.shape, self.conditions(rows), {"x0": to_unit(pixels)})


@dataclass(frozen=True)
class Stored:
    """Tensors by name, float32 [N, ...], with their labels or prompts: noise and x0, or winner and loser."""

    tensors: Mapping[str, Tensor]
    conditions: LabelRows | WordPrompts

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(next(iter(self.tensors.values())).shape[1:])

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        rows = random.integers(size, len(self.conditions))
        chosen = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return Batch(size, self.shape, self.conditions(rows), chosen)


@dataclass(frozen=True)
class Prompts:
    """Uniform encoded prompts: all that a data-free method needs for a text-conditioned teacher. For captioned images,
    each sample is an image's latents, ``x0``, and its prompt; for preference pairs the latents ``winner`` and
    ``loser``, and their prompt. All samples of a batch have one shape: one of ``shapes``, or that of the latents."""

    prompts: EncodedPrompts
    shapes: Sequence[tuple[int, ...]]

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        if not self.prompts.buckets:
            shape = self.shapes[int(random.integers(1, len(self.shapes), "bucket"))]
            return Batch(size, shape, self.prompts(random.integers(size, len(self.prompts))))
        counts = torch.tensor([len(bucket.prompts) for bucket in self.prompts.buckets])
        sample = random.integers(1, int(counts.sum()), "bucket")
        latents, prompts = self.prompts.buckets[int((sample >= counts.cumsum(0)).sum())]
        rows = random.integers(size, len(prompts))
        chosen = {name: tensor[rows] for name, tensor in latents.items()}
        return Batch(size, tuple(next(iter(chosen.values())).shape[1:]), self.prompts(prompts[rows]), chosen)
