"""Prompts, and captioned pictures, to a folder of shards: what ``encoded.EncodedPrompts`` reads. It can go on where it
stopped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fewstep.core.errors import UserError
from fewstep.core.files import read_prompts, write_tensors, write_text
from fewstep.core.image_files import PICTURES, VIDEOS, Cover, files_of, read_picture, read_video, size_of
from fewstep.models.hub.encoded import PROMPTS, Index, fingerprint, read_index
from fewstep.models.hub.folder import PipelineFolder

Progress = Callable[[int, int], None]  # how many of how many


@torch.no_grad()
def encode_prompts(
    folder: PipelineFolder, prompts: Sequence[str], out: Path, *, batch: int = 16, rows: int = 512,
    device: torch.device | str = "cpu", images: int = 0, sizes: tuple[tuple[int, int], ...] = (),
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Writes the folder; shards that are already there are kept.

    Raises ``UserError`` if the pipeline has no text encoder or if ``out`` holds other prompts or another encoder's.
    """
    encoders = fingerprint(folder)
    if not encoders:
        raise UserError(f"{folder.path} has no text encoder.")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    index = Index(
        pipeline=folder.index["_class_name"], encoders=encoders, prompts=digest, count=len(prompts), rows=rows,
        images=images, sizes=sizes,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    if (out / "index.json").is_file():
        if read_index(out) != index:
            raise UserError(f"{out} holds other prompts, or those of another encoder; choose another folder.")
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder.")
    write_text(index.model_dump_json(indent=1) + "\n", out / "index.json")
    write_text("".join(f"{prompt}\n" for prompt in prompts), out / PROMPTS)
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
            progress(last, len(prompts))


@torch.no_grad()
def encode_images(
    folder: PipelineFolder, source: Path, out: Path, *, sizes: Sequence[Cover] = (), frames: int = 1, batch: int = 32,
    rows: int = 512, device: torch.device | str = "cpu", progress: Progress | None = None,
) -> int:  # fmt: skip
    """Latents of the pictures in a folder (of the first ``frames`` of its videos, if that is more than 1), with the
    captions of the text files beside them (``a.png`` and ``a.txt``), encoded as ``encode_prompts`` does. Returns the
    number of files.

    With ``sizes`` (height, width) each goes to that of the nearest proportions, scaled and cropped to it; without, all
    must be of one size. Raises ``UserError`` that names a file without a caption, a damaged or another size's one.
    """
    suffixes = VIDEOS if frames > 1 else PICTURES
    files = files_of(source, suffixes)
    if not files:
        raise UserError(f"No {'videos' if frames > 1 else 'pictures'} ({', '.join(suffixes)}) in {source}.")
    captions = {file: _caption(file) for file in files}
    prompts = list(dict.fromkeys(captions.values()))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    buckets = _buckets(files, sizes)
    for height, width in buckets:
        folder.family.shape(height, width, frames)  # refuses what the model cannot take
    encode_prompts(folder, prompts, out, device=device, images=len(files), rows=rows, sizes=tuple(sizes))
    pipeline = folder.pipeline().to(device)
    pieces = [(size, own[low : low + rows]) for size, own in buckets.items() for low in range(0, len(own), rows)]
    done = 0
    for shard, (size, own) in enumerate(pieces):
        file = out / f"images-{shard:05d}.safetensors"
        if not file.is_file():
            parts = []
            for low in range(0, len(own), batch):
                pixels = torch.stack([_pixels(one, frames, size) for one in own[low : low + batch]])
                parts.append(folder.family.encode_images(pipeline, pixels.float() / 127.5 - 1).cpu())
            said = torch.tensor([number[captions[one]] for one in own])
            write_tensors({"x0": torch.cat(parts), "prompt": said}, file)
        done += len(own)
        if progress is not None:
            progress(done, len(files))
    return len(files)


def _pixels(file: Path, frames: int, cover: Cover) -> torch.Tensor:
    return read_video(file, frames, cover) if frames > 1 else read_picture(file, cover=cover)


def _buckets(files: Sequence[Path], sizes: Sequence[Cover]) -> dict[Cover, list[Path]]:
    """The files by the size (height, width) that they are encoded at."""
    found: dict[Cover, list[Path]] = {}
    for file in files:
        size = height, width = size_of(file)
        if sizes:
            size = min(sizes, key=lambda wanted: abs(math.log(wanted[0] / wanted[1] * width / height)))
        found.setdefault(size, []).append(file)
        if not sizes and len(found) > 1:
            raise UserError(f"{file} is not of the size of {files[0]}; make all one size, or give --sizes.")
    return found


def _caption(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise UserError(f"{picture} has no caption: {file.name} is not there.")
    prompts = read_prompts(file)
    if len(prompts) != 1:
        raise UserError(f"{file} has {len(prompts)} lines; a caption is one.")
    return prompts[0]
