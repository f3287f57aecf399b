"""Prompts encoded once, so that text encoders stay out of memory in training: shards of tensors with an index.

FOLDER/index.json            what was encoded by what: hashes of the prompts and of the encoders, rows a shard
FOLDER/null.safetensors      the null condition, one row
FOLDER/shard-00000.safetensors ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.store import read_tensors, write_tensors, write_text

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
    digest = hashlib.sha256()
    files = [file for name in ENCODERS for file in sorted((folder.path / name).rglob("*")) if file.is_file()]
    for file in files:
        digest.update(str(file.relative_to(folder.path)).encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest() if files else ""


@torch.no_grad()
def encode_prompts(
    folder: PipelineFolder, prompts: Sequence[str], out: Path, *, batch: int = 16, rows: int = 512,
    device: torch.device | str = "cpu", progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Writes the folder; shards that are already there are kept. ``progress`` gets the number of prompts done.

    Raises ``UserError`` if the pipeline has no text encoder or if ``out`` holds other prompts or another encoder's.
    """
    encoders = fingerprint(folder)
    if not encoders:
        raise UserError(f"{folder.path} has no text encoder.")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    index = Index(
        pipeline=folder.index["_class_name"], encoders=encoders, prompts=digest, count=len(prompts), rows=rows
    )
    out.mkdir(parents=True, exist_ok=True)
    if (out / "index.json").is_file():
        if read_index(out) != index:
            raise UserError(f"{out} holds other prompts, or those of another encoder; choose another folder.")
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder.")
    write_text(index.model_dump_json(indent=1) + "\n", out / "index.json")
    pipeline = folder.pipeline().to(device)
    if not (out / "null.safetensors").is_file():
        write_tensors(folder.family.encode(pipeline, [""]), out / "null.safetensors")
    for shard, first in enumerate(range(0, len(prompts), rows)):
        file, last = out / f"shard-{shard:05d}.safetensors", min(first + rows, len(prompts))
        if not file.is_file():
            parts = [
                folder.family.encode(pipeline, prompts[low : min(low + batch, last)])
                for low in range(first, last, batch)
            ]
            write_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, file)
        if progress is not None:
            progress(last)


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises ``UserError`` if it is none of encoded prompts."""
    try:
        return Index.model_validate_json((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} holds no encoded prompts: make it with fewstep encode.") from error


class EncodedPrompts:
    """The conditions of a folder of encoded prompts, read row by row from disk."""

    def __init__(self, folder: Path) -> None:
        self.index = read_index(folder)
        self._folder = folder
        self._null = read_tensors(folder / "null.safetensors")
        shards = -(-len(self) // self.index.rows)
        if not all((folder / f"shard-{shard:05d}.safetensors").is_file() for shard in range(shards)):
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
