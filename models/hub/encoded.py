"""Prompts (and pictures) encoded once, so that no encoder is in memory in training: shards of tensors with an index.

``index.json`` says what was encoded by what (hashes of the prompts and of the encoders) and how many rows a shard has;
``null.safetensors`` is the null condition, one row; then ``shard-00000.safetensors`` and so on and, of captioned
pictures, ``images-00000.safetensors``: latents ``x0`` and the number of each one's ``prompt``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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
    images: int = 0


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
    device: torch.device | str = "cpu", images: int = 0, progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Writes the folder; shards that are already there are kept. ``progress`` gets the number of prompts done.

    Raises ``UserError`` if the pipeline has no text encoder or if ``out`` holds other prompts or another encoder's.
    """
    encoders = fingerprint(folder)
    if not encoders:
        raise UserError(f"{folder.path} has no text encoder.")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    index = Index(
        pipeline=folder.index["_class_name"],
        encoders=encoders,
        prompts=digest,
        count=len(prompts),
        rows=rows,
        images=images,
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


@torch.no_grad()
def encode_images(
    folder: PipelineFolder, images: Path, out: Path, *, batch: int = 32, rows: int = 4096,
    device: torch.device | str = "cpu", progress: Callable[[int], None] | None = None,
) -> int:  # fmt: skip
    """Latents of the pictures in the folder ``images``, all of one size, with the captions of the text files beside
    them (``a.png`` and ``a.txt``), encoded as ``encode_prompts`` does. Returns the number of pictures.

    Raises ``UserError`` that names a picture without a caption, a damaged one, or one of another size.
    """
    files = sorted(file for file in images.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"No pictures ({', '.join(PICTURES)}) in {images}.")
    captions = [_caption(file) for file in files]
    prompts = list(dict.fromkeys(captions))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    encode_prompts(folder, prompts, out, device=device, images=len(files), rows=rows)
    pipeline = folder.pipeline().to(device)
    size = _pixels(files[0]).shape
    for shard, first in enumerate(range(0, len(files), rows)):
        file, own = out / f"images-{shard:05d}.safetensors", files[first : first + rows]
        if not file.is_file():
            parts = []
            for low in range(0, len(own), batch):
                pixels = [_pixels(picture) for picture in own[low : low + batch]]
                if wrong := [p for p, x in zip(own[low:], pixels, strict=False) if x.shape != size]:
                    raise UserError(f"{wrong[0]} is not of the size of {files[0]}; make all pictures one size.")
                parts.append(folder.family.encode_images(pipeline, torch.stack(pixels)).cpu())
            rows_of_prompts = torch.tensor([number[caption] for caption in captions[first : first + rows]])
            write_tensors({"x0": torch.cat(parts), "prompt": rows_of_prompts}, file)
        if progress is not None:
            progress(first + len(own))
    return len(files)


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _caption(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise UserError(f"{picture} has no caption: {file.name} is not there.")
    prompts = read_prompts(file)
    if len(prompts) != 1:
        raise UserError(f"{file} has {len(prompts)} lines; a caption is one.")
    return prompts[0]


def _pixels(file: Path) -> Tensor:
    """A picture, float32 [3, H, W] in [-1, 1]."""
    try:
        with Image.open(file) as picture:
            pixels = np.array(picture.convert("RGB"))
    except OSError as error:
        raise UserError(f"{file} is no readable picture ({error}).") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises ``UserError`` if it is none of encoded prompts."""
    try:
        return Index.model_validate_json((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} holds no encoded prompts: make it with fewstep encode.") from error


class EncodedPrompts:
    """The conditions of a folder of encoded prompts, read row by row from disk; ``latents`` are those of its captioned
    images [N, C, ...], in memory, with the number of each one's prompt."""

    def __init__(self, folder: Path) -> None:
        self.index = read_index(folder)
        self._folder = folder
        self._null = read_tensors(folder / "null.safetensors")
        shards = -(-len(self) // self.index.rows)
        if not all((folder / f"shard-{shard:05d}.safetensors").is_file() for shard in range(shards)):
            raise UserError(f"{folder} is incomplete: run fewstep encode again, it goes on where it stopped.")
        self.latents: tuple[Tensor, Tensor] | None = None
        if self.index.images:
            parts = [read_tensors(file) for file in sorted(folder.glob("images-*.safetensors"))]
            if sum(len(part["x0"]) for part in parts) != self.index.images:
                raise UserError(f"{folder} is incomplete: run fewstep encode again, it goes on where it stopped.")
            self.latents = torch.cat([p["x0"] for p in parts]), torch.cat([p["prompt"] for p in parts])

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
