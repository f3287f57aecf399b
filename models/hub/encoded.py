"""Prompts (and images) encoded once, so that training needs no encoder in memory: shards of tensors with an index.

``index.json`` records what was encoded (hashes of the prompts and the encoders) and the rows per shard. ``prompts.txt``
contains the prompts, ``null.safetensors`` the null condition (one row), ``shard-00000.safetensors`` etc. the conditions
and, for captioned images, ``images-00000.safetensors`` etc. latents ``x0``, all of one shape, and ``prompt`` numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, sha256
from fewstep.models.condition import Condition
from fewstep.models.hub.folder import PipelineFolder

PROMPTS = "prompts.txt"  # the encoded prompts, in order
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


class Index(BaseModel):
    """``index.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: str = "fewstep-prompts"
    pipeline: str
    encoders: str
    prompts: str
    count: int
    rows: int
    images: int = 0
    sizes: tuple[tuple[int, int], ...] = ()


def fingerprint(folder: PipelineFolder) -> str:
    """SHA-256 of the files of a pipeline's text encoders and tokenizers, whatever their paths; empty if it has none."""
    files = [file for name in ENCODERS for file in sorted((folder.path / name).rglob("*")) if file.is_file()]
    return sha256(*files) if files else ""


def read_index(folder: Path) -> Index:
    """The index of a folder of encoded prompts. Raises ``UserError`` if it is missing or damaged."""
    try:
        return Index.model_validate_json((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} contains no encoded prompts: create it with fewstep data encode.") from error


class EncodedPrompts:
    """The conditions in a folder of encoded prompts, read row by row from disk. ``buckets`` are the latents of the
    captioned images, in memory: for each shape, ``x0`` [N, C, ...] and prompt numbers [N].

    Raises ``UserError`` if files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.index = read_index(folder)
        self._folder = folder
        self._null = read_tensors(folder / "null.safetensors")
        shards = -(-len(self) // self.index.rows)
        complete = all((folder / f"shard-{shard:05d}.safetensors").is_file() for shard in range(shards))
        by_shape: dict[torch.Size, list[dict[str, Tensor]]] = {}
        for file in sorted(folder.glob("images-*.safetensors")):
            part = read_tensors(file)
            by_shape.setdefault(part["x0"].shape[1:], []).append(part)
        self.buckets = [
            (torch.cat([part["x0"] for part in parts]), torch.cat([part["prompt"] for part in parts]))
            for parts in by_shape.values()
        ]
        if not complete or sum(len(x0) for x0, _ in self.buckets) != self.index.images:
            raise UserError(f"{folder} is incomplete: repeat the fewstep data encode command, which continues it.")

    def check(self, pipeline: PipelineFolder) -> None:
        """Raises ``UserError`` if the pipeline has text encoders and these are not their embeddings."""
        wanted = fingerprint(pipeline)
        if wanted and wanted != self.index.encoders:
            raise UserError(
                f"The prompts in {self._folder} were encoded by other text encoders than those of {pipeline.path}; "
                f"encode them again with fewstep data encode --teacher {pipeline.path}."
            )

    def __len__(self) -> int:
        return self.index.count

    def __call__(self, rows: Tensor) -> Condition:
        """The condition of the prompts with these numbers [B]."""
        found: list[dict[str, Tensor]] = []
        for row in rows.tolist():
            shard, offset = divmod(row, self.index.rows)
            with safe_open(self._folder / f"shard-{shard:05d}.safetensors", framework="pt") as file:
                found.append({name: file.get_slice(name)[offset : offset + 1] for name in self._null})
        return Condition({name: torch.cat([one[name] for one in found]) for name in self._null}, self._null)
