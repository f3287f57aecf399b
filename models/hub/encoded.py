"""Prompts (and images) encoded once, so that training needs no encoder in memory: shards of tensors with an index.

``index.json`` records what was encoded (hashes of the prompts and the encoders) and the rows per shard. ``prompts.txt``
contains the prompts, ``null.safetensors`` the null condition (one row), ``shard-00000.safetensors`` etc. the
conditions. Captioned images are in ``images-00000.safetensors`` etc.: latents ``x0``, all of one shape, and ``prompt``
numbers; preference pairs in ``pairs-00000.safetensors`` etc.: latents ``winner`` and ``loser``, and ``prompt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, reading, sha256
from fewstep.models.condition import Condition
from fewstep.models.hub.folder import PipelineFolder

PROMPTS = "prompts.txt"  # the encoded prompts, in order
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


SAMPLES = {"images": ("x0",), "pairs": ("winner", "loser")}  # the latents in each kind of shard
ANY_LENGTH = 8  # the number of tokens in ``Family.condition_shapes``


class Index(BaseModel):
    """``index.json``. ``pairs`` is the number of preference pairs, ``source`` the hash of what they were made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fewstep-prompts"] = "fewstep-prompts"
    pipeline: str
    encoders: str
    prompts: str
    count: int = Field(ge=1)
    rows: int = Field(ge=1)
    images: int = Field(0, ge=0)
    sizes: tuple[tuple[int, int], ...] = ()
    pairs: int = Field(0, ge=0)
    source: str = ""


class Bucket(NamedTuple):
    """Latents of one shape by name, [N, C, ...] each, and their prompt numbers [N]."""

    latents: dict[str, Tensor]
    prompts: Tensor


def fingerprint(folder: PipelineFolder, components: Sequence[str] = ENCODERS) -> str:
    """SHA-256 of the files of a pipeline's components, by default its text encoders and tokenizers, whatever their
    paths; empty if it has none."""
    files = [file for name in components for file in sorted((folder.path / name).rglob("*")) if file.is_file()]
    return sha256(*files) if files else ""


def read_index(folder: Path) -> Index:
    """The index of a folder of encoded prompts. Raises ``UserError`` if it is missing or damaged."""
    file = folder / "index.json"
    with reading(file, "index of encoded prompts", "Create it with fewstep data encode."):
        return Index.model_validate_json(file.read_bytes())


class EncodedPrompts:
    """The conditions in a folder of encoded prompts, read row by row from disk. ``buckets`` are the latents of its
    captioned images or preference pairs, in memory, one bucket per shape; none with ``samples=False``.

    Raises ``UserError`` if files are missing or damaged.
    """

    def __init__(self, folder: Path, *, samples: bool = True) -> None:
        self.index = read_index(folder)
        self._folder = folder
        self._null = read_tensors(folder / "null.safetensors")
        if not all(value.shape[:1] == (1,) and value.isfinite().all() for value in self._null.values()):
            raise UserError(f"{folder / 'null.safetensors'} is damaged: it must be one finite row.")
        rows, shards = self.index.rows, range(-(-len(self) // self.index.rows))
        complete = all(self._shard(shard).is_file() for shard in shards)
        for shard in shards if complete else ():
            self._check_shard(self._shard(shard), min(rows, len(self) - shard * rows))
        self.buckets = _read_buckets(folder, len(self)) if samples else []
        found = sum(len(bucket.prompts) for bucket in self.buckets)
        if not complete or (samples and found != self.index.images + self.index.pairs):
            raise UserError(f"{folder} is incomplete: repeat the fewstep data command, which continues it.")

    def check(self, pipeline: PipelineFolder, shape: Sequence[int]) -> None:
        """Raises ``UserError`` if the conditions are not those of the pipeline (embeddings of other text encoders than
        its own, other names or widths), or the latents not of its kind (``shape`` is one of its own)."""
        wanted = fingerprint(pipeline)
        if wanted and wanted != self.index.encoders:
            raise UserError(
                f"The prompts in {self._folder} were encoded by other text encoders than those of {pipeline.path}; "
                f"encode them again with fewstep data encode --teacher {pipeline.path}."
            )

        own = pipeline.family.condition_shapes
        given = {name: tuple(value.shape[1:]) for name, value in self._null.items()}
        if given.keys() != own.keys() or any(not _fits(given[name], own[name]) for name in own):
            raise UserError(
                f"The conditions in {self._folder} are {_shapes(given)}, those of {pipeline.path} are {_shapes(own)} "
                f"(for {ANY_LENGTH} tokens); encode the prompts with fewstep data encode --teacher {pipeline.path}."
            )
        for bucket in self.buckets:
            for name, latents in bucket.latents.items():
                if latents.ndim != 1 + len(shape) or latents.shape[1] != shape[0]:
                    raise UserError(
                        f"The latents {name} in {self._folder} are {list(latents.shape[1:])}, those of {pipeline.path} "
                        f"are {list(shape)}: they come from another autoencoder."
                    )

    def __len__(self) -> int:
        return self.index.count

    def __call__(self, rows: Tensor) -> Condition:
        """The condition of the prompts with these numbers [B]."""
        found: list[dict[str, Tensor]] = []
        for row in rows.tolist():
            shard, offset = divmod(row, self.index.rows)
            path = self._shard(shard)
            with reading(path, "shard of encoded prompts"), safe_open(path, framework="pt") as file:
                found.append({name: file.get_slice(name)[offset : offset + 1] for name in self._null})
            if not all(value.isfinite().all() for value in found[-1].values()):
                raise UserError(f"{path} is damaged: row {offset} is not finite.")
        return Condition({name: torch.cat([one[name] for one in found]) for name in self._null}, self._null)

    def _shard(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _check_shard(self, path: Path, rows: int) -> None:
        """Raises ``UserError`` if a shard has not this number of rows, each like the null condition's."""
        with reading(path, "shard of encoded prompts"), safe_open(path, framework="pt") as file:
            for name, null in self._null.items():
                part = file.get_slice(name)
                first = part[:1]
                if part.get_shape()[0] != rows or first.shape != null.shape or first.dtype != null.dtype:
                    raise UserError(
                        f"{path} is damaged: {name} must be {[rows, *null.shape[1:]]} of {null.dtype}, got "
                        f"{part.get_shape()} of {first.dtype}."
                    )


def _read_buckets(folder: Path, prompts: int) -> list[Bucket]:
    """The latents in the shards of a folder by kind and shape. Raises ``UserError`` on a damaged shard."""
    parts: dict[tuple[str, torch.Size], list[dict[str, Tensor]]] = {}
    for kind, names in SAMPLES.items():
        for file in sorted(folder.glob(f"{kind}-*.safetensors")):
            part = read_tensors(file)
            sound = part.keys() == {*names, "prompt"} and part["prompt"].dtype == torch.int64
            if not sound or len({tensor.shape for name, tensor in part.items() if name != "prompt"}) != 1:
                raise UserError(f"{file} is damaged: it needs prompt, and {' and '.join(names)} of one shape.")
            number, latents = part["prompt"], part[names[0]]
            if number.ndim != 1 or number.shape != latents.shape[:1] or not ((number >= 0) & (number < prompts)).all():
                raise UserError(f"{file} is damaged: prompt must be one of the {prompts} numbers for each sample.")
            if not all(part[name].isfinite().all() for name in names):
                raise UserError(f"{file} is damaged: a latent is not finite.")
            parts.setdefault((kind, latents.shape[1:]), []).append(part)
    return [
        Bucket(
            {name: torch.cat([part[name] for part in some]) for name in SAMPLES[kind]},
            torch.cat([part["prompt"] for part in some]),
        )
        for (kind, _), some in parts.items()
    ]


def _fits(given: Sequence[int], own: Sequence[int]) -> bool:
    return len(given) == len(own) and all(b in (a, ANY_LENGTH) for a, b in zip(given, own, strict=True))


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
