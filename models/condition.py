"""The inputs of a network besides ``x_t`` and ``t``: labels, prompt embeddings, masks, a step count, an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.transfer import send


@dataclass(frozen=True, eq=False)
class Condition(Mapping[str, Tensor]):
    """Named tensors with a leading batch axis, and the null values of those that guidance drops.

    ``tensors``: e.g. ``labels`` [B] int64, ``words`` [B, L] int64, ``prompt`` [B, L, D], ``mask`` [B, L], ``steps`` [B]
    int64 (the step count of a student that supports several), ``image`` [B, C, ...]. ``nulls``: for a subset of the
    names, the value that means "no condition", without the batch axis. Names without one (such as the step count) are
    kept by ``null()``.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    nulls: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.nulls) - set(self.tensors)
        if unknown:
            raise ValueError(f"null values for names that are not in the condition: {sorted(unknown)}")
        sizes = {name: value.shape[0] for name, value in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the tensors of a condition must have one batch size, got {sizes}")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def null(self, where: Tensor | None = None) -> Condition:
        """The null condition; with ``where`` ([B] bool), only for the marked samples (condition dropout)."""

        def drop(name: str, value: Tensor) -> Tensor:
            if name not in self.nulls:
                return value
            null = send(self.nulls[name].to(value.dtype), value.device).expand_as(value)
            if where is None:
                return null
            return torch.where(send(where, value.device).reshape(-1, *[1] * (value.ndim - 1)), null, value)

        return Condition({name: drop(name, value) for name, value in self.tensors.items()}, self.nulls)

    def index(self, rows: Tensor | slice) -> Condition:
        """The condition of some samples: ``rows`` is a slice, an index tensor or a [B] boolean mask."""
        return Condition({name: value[rows] for name, value in self.tensors.items()}, self.nulls)

    def repeat(self, n: int) -> Condition:
        """The condition of a batch in which every sample stands ``n`` times in a row."""
        return Condition({name: value.repeat_interleave(n, 0) for name, value in self.tensors.items()}, self.nulls)

    def to(self, device: torch.device | str) -> Condition:
        device = torch.device(device)
        return Condition(
            {name: send(value, device) for name, value in self.tensors.items()},
            {name: send(value, device) for name, value in self.nulls.items()},
        )

    def replace(self, **values: Tensor) -> Condition:
        """A copy with some values added or replaced, e.g. ``condition.replace(steps=k)``."""
        return Condition({**self.tensors, **values}, self.nulls)

    @staticmethod
    def cat(*parts: Condition) -> Condition:
        """Concatenates conditions with equal names along the batch axis. Raises ``ValueError`` if the names differ."""
        names = set(parts[0])
        if any(set(part) != names for part in parts):
            raise ValueError(f"cannot concatenate conditions with different names: {[sorted(part) for part in parts]}")
        return Condition({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, parts[0].nulls)

    @staticmethod
    def of_labels(labels: Tensor, classes: int) -> Condition:
        """Class labels [B] in [0, classes); the null label is ``classes``. Of 0 classes the condition is empty."""
        if not classes:
            return Condition()
        return Condition({"labels": labels}, {"labels": torch.tensor(classes)})


@dataclass(frozen=True)
class LabelRows:
    """The labels [N] of samples, of ``classes`` classes (0: none): what ``vocabulary.WordPrompts`` is to captions."""

    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, rows: Tensor) -> Condition:
        """The condition of the samples with these numbers [B]."""
        return Condition.of_labels(self.labels[rows], self.classes)
