"""Prompts (and pictures) encoded once, so that no encoder is in memory in training: shards of tensors with an index.

``index.json`` says what was encoded by what (hashes of the prompts and of the encoders) and how many rows a shard has;
``prompts.txt`` has the prompts, ``null.safetensors`` the null condition, one row; then ``shard-00000.safetensors`` and
so on and, of captioned pictures, ``images-00000.safetensors``: latents ``x0``, all of one shape, and the number of each
one's ``prompt``.
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

PROMPTS = "prompts.txt"  # what was encoded, in order
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


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file, UTF-8, one prompt each. Raises ``UserError`` that names an empty or unreadable line."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the prompts in {file}: {error}.") from error
    prompts = []
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number} is not UTF-8 ({error.reason}); save the file as UTF-8.") from error
        if not line:
            raise UserError(f"{file}, line {number} is empty; every line is a prompt.")
        prompts.append(line)
    if not prompts:
        raise UserError(f"{file} holds no prompts.")
    return prompts


def fingerprint(folder: PipelineFolder) -> str:
    """A hash of the text encoders and tokenizers of a pipeline: files, not paths. Empty if it has none."""
    files = [file for name in ENCODERS for file in sorted((folder.path / name).rglob("*")) if file.is_file()]
    return sha256(*files) if files else ""


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises ``UserError`` if it is none of encoded prompts."""
    try:
        return Index.model_validate_json((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} holds no encoded prompts: make it with fewstep encode.") from error


class EncodedPrompts:
    """The conditions of a folder of encoded prompts, read row by row from disk. ``buckets`` are the latents of its
    captioned images, in memory: for each shape ``x0`` [N, C, ...] and the number of each one's prompt [N]."""

    def __init__(self, folder: Path) -> None:
        self.index = read_index(folder)
        self._folder = folder
        self._null = read_tensors(folder / "null.safetensors")
        shards = -(-len(self) // self.index.rows)
        whole = all((folder / f"shard-{shard:05d}.safetensors").is_file() for shard in range(shards))
        by_shape: dict[torch.Size, list[dict[str, Tensor]]] = {}
        for file in sorted(folder.glob("images-*.safetensors")):
            part = read_tensors(file)
            by_shape.setdefault(part["x0"].shape[1:], []).append(part)
        self.buckets = [
            (torch.cat([part["x0"] for part in parts]), torch.cat([part["prompt"] for part in parts]))
            for parts in by_shape.values()
        ]
        if not whole or sum(len(x0) for x0, _ in self.buckets) != self.index.images:
            raise UserError(f"{folder} is incomplete: run fewstep encode again, it goes on where it stopped.")

    def check(self, pipeline: PipelineFolder) -> None:
        """Raises ``UserError`` if these are not the embeddings of the pipeline's text encoders (if it has some)."""
        wanted = fingerprint(pipeline)
        if wanted and wanted != self.index.encoders:
            raise UserError(
                f"The prompts in {self._folder} were encoded by another pipeline's text encoders than those of "
                f"{pipeline.path}; encode them again with --teacher {pipeline.path}."
            )

    def __len__(self) -> int:
        return self.index.count

    def __call__(self, rows: Tensor) -> Condition:
        """The condition of prompts by number [B]."""
        found: list[dict[str, Tensor]] = []
        for row in rows.tolist():
            shard, place = divmod(row, self.index.rows)
            with safe_open(self._folder / f"shard-{shard:05d}.safetensors", framework="pt") as file:
                found.append({name: file.get_slice(name)[place : place + 1] for name in self._null})
        return Condition({name: torch.cat([one[name] for one in found]) for name in self._null}, self._null)
