"""Encoding prompts and captioned images or videos into a folder of shards, which ``encoded.EncodedPrompts`` reads.

An interrupted call can be repeated: existing shards are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fewstep.core.errors import UserError
from fewstep.core.files import check_writable, require_empty, sha256, write_tensors, write_text
from fewstep.core.image_files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Cover,
    EmbeddedImage,
    ImageFile,
    file_bytes,
    image_size,
    list_files,
    read_image,
    read_video,
    to_unit,
)
from fewstep.core.image_rows import Columns, caption_beside
from fewstep.core.image_tables import table_rows
from fewstep.core.paths import file_inside
from fewstep.core.tables import read_captioned, read_texts
from fewstep.models.hub.encoded import PROMPTS, Index, fingerprint, read_index
from fewstep.models.hub.folder import PipelineFolder

Progress = Callable[[int, int], None]  # number done, total number
T = TypeVar("T")
F = TypeVar("F", bound=ImageFile)


@torch.no_grad()
def encode_prompts(
    folder: PipelineFolder, prompts: Sequence[str], out: Path, *, batch: int = 16, rows: int = 512,
    device: torch.device | str = "cpu", images: int = 0, sizes: tuple[tuple[int, int], ...] = (), pairs: int = 0,
    source: str = "", progress: Progress | None = None,
) -> None:  # fmt: skip
    """Encodes prompts, ``batch`` at a time, into shards of ``rows`` rows in ``out``; existing shards are kept. The last
    arguments go into the index (see there), for what the caller adds.

    Raises ``UserError`` if the pipeline has no text encoder, or if ``out`` contains other prompts or those of another
    encoder.
    """
    encoders = fingerprint(folder)
    if not encoders:
        raise UserError(f"{folder.path} has no text encoder.")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    index = Index(
        pipeline=folder.index["_class_name"], encoders=encoders, prompts=digest, count=len(prompts), rows=rows,
        images=images, sizes=sizes, pairs=pairs, source=source,
    )  # fmt: skip
    if not (out / "index.json").is_file():
        require_empty(out)
    else:
        present = read_index(out)
        if differing := [name for name in Index.model_fields if getattr(present, name) != getattr(index, name)]:
            raise UserError(
                f"{out} contains other prompts or samples, or those of another encoder ({', '.join(differing)} in "
                "index.json would differ); choose another folder."
            )
    _ = folder.network_class  # needs the extra, before anything is written
    check_writable(out / "index.json")
    pipeline = folder.pipeline().to(device)  # before the index, which a damaged encoder would bind to itself
    write_text(index.model_dump_json(indent=1) + "\n", out / "index.json")
    write_text("".join(f"{prompt}\n" for prompt in prompts), out / PROMPTS)
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


class Captioned(NamedTuple):
    """An image or video file and its caption."""

    file: ImageFile
    caption: str


def captioned_folder(source: Path, frames: int = 1) -> list[Captioned]:
    """The images of a folder (with ``frames`` > 1 its videos), and their captions in text files of the same name
    (``a.png`` and ``a.txt``). Raises ``UserError`` if there are none, or one has no caption."""
    suffixes = VIDEO_SUFFIXES if frames > 1 else IMAGE_SUFFIXES
    files = list_files(source, suffixes)
    if not files:
        raise UserError(f"No {'videos' if frames > 1 else 'images'} ({', '.join(suffixes)}) in {source}.")
    return [Captioned(file, caption_beside(file)) for file in files]


def captioned_table(
    table: Path, image: str, caption: str | None = None, frames: int = 1, setting: str | None = None
) -> list[Captioned]:
    """The images in the column ``image`` of a table and their captions (see ``core.tables.read_texts``). It names files
    in its folder (with ``frames`` > 1 videos); a .parquet table may also hold them. Raises ``UserError`` that names a
    row."""
    if table.suffix.lower() != ".parquet":
        suffixes = VIDEO_SUFFIXES if frames > 1 else IMAGE_SUFFIXES
        return [
            Captioned(file_inside(table.parent, name, suffixes, f"{table}, row {number}"), text)
            for number, (name, text) in enumerate(read_captioned(table, (image,), caption, setting), start=1)
        ]
    if frames > 1:
        raise UserError(f"{table}: videos are named by a .csv or .jsonl table, or lie in a folder.")
    texts = read_texts(table, caption, setting)
    rows = table_rows(str(table), None, "train", Columns(image=image))
    file = rows.file
    assert file is not None
    return [
        Captioned(EmbeddedImage(rows.where(row), lambda row=row: file_bytes(file(row))), text)  # type: ignore[misc]
        for row, text in enumerate(texts)
    ]


@torch.no_grad()
def encode_images(
    folder: PipelineFolder, images: Sequence[Captioned], out: Path, *, sizes: Sequence[Cover] = (), frames: int = 1,
    batch: int = 32, rows: int = 512, device: torch.device | str = "cpu", progress: Progress | None = None,
) -> int:  # fmt: skip
    """Encodes images (with ``frames`` > 1, the first ``frames`` frames of videos) and their captions. Returns their
    number.

    With ``sizes`` (height, width), each file is scaled and cropped to the size with the nearest aspect ratio; otherwise
    all must have one size. Raises ``UserError`` that names a file or row that is damaged or has another size.
    """
    require_vae(folder)
    files, captions = [image.file for image in images], [image.caption for image in images]
    prompts = list(dict.fromkeys(captions))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    size_of = {file: size for size, same in group_by_size(files, sizes).items() for file in same}
    buckets: dict[Cover, list[Captioned]] = {}
    for image in images:
        buckets.setdefault(size_of[image.file], []).append(image)
    for height, width in buckets:
        folder.family.shape(height, width, frames)  # raises if the model does not support the size
    encode_prompts(
        folder, prompts, out, device=device, images=len(images), rows=rows, sizes=tuple(sizes),
        source=source_hash(folder, files, captions, frames),
    )  # fmt: skip
    pipeline = folder.pipeline().to(device)

    def encoded(piece: Sequence[Captioned], size: Cover) -> dict[str, torch.Tensor]:
        prompt = torch.tensor([number[image.caption] for image in piece])
        latents = latents_of(folder, pipeline, [image.file for image in piece], frames, size, batch)
        return {"x0": latents, "prompt": prompt}

    write_shards(out, "images", buckets, rows, encoded, progress)
    return len(images)


def source_hash(folder: PipelineFolder, files: Sequence[ImageFile], captions: Sequence[str], frames: int) -> str:
    """The hash of what latents and their prompt numbers are computed from, for the index: the contents of the files,
    the captions and the VAE."""
    contents = {
        file: sha256(file) if isinstance(file, Path) else hashlib.sha256(file.read()).hexdigest() for file in set(files)
    }
    made_from = [frames, fingerprint(folder, ("vae",)), [contents[file] for file in files], list(captions)]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def write_shards(
    out: Path, kind: str, buckets: Mapping[Cover, Sequence[T]], rows: int,
    encoded: Callable[[Sequence[T], Cover], dict[str, torch.Tensor]], progress: Progress | None,
) -> None:  # fmt: skip
    """Writes ``KIND-00000.safetensors`` etc. with the ``encoded`` tensors of up to ``rows`` items of one size each;
    existing files are kept."""
    pieces = [(size, same[low : low + rows]) for size, same in buckets.items() for low in range(0, len(same), rows)]
    done = 0
    for shard, (size, piece) in enumerate(pieces):
        file = out / f"{kind}-{shard:05d}.safetensors"
        if not file.is_file():
            write_tensors(encoded(piece, size), file)
        done += len(piece)
        if progress is not None:
            progress(done, sum(map(len, buckets.values())))


def require_vae(folder: PipelineFolder) -> None:
    """Raises ``UserError`` if a pipeline has no VAE."""
    if not folder.has_component("vae"):
        raise UserError(f"{folder.path} has no VAE, which turns images into latents and back.")


def latents_of(
    folder: PipelineFolder, pipeline: Any, files: Sequence[ImageFile], frames: int, size: Cover, batch: int
) -> torch.Tensor:
    """The latents [N, C, ...] of images, or of videos with ``frames`` > 1, at one ``size``, on the host."""
    parts = []
    for low in range(0, len(files), batch):
        some = files[low : low + batch]
        pixels = torch.stack([_pixels(file, frames, size) for file in some])
        parts.append(folder.family.encode_images(pipeline, to_unit(pixels)).cpu())
    return torch.cat(parts)


def _pixels(file: ImageFile, frames: int, size: Cover) -> torch.Tensor:
    return read_video(file, frames, size) if frames > 1 and isinstance(file, Path) else read_image(file, cover=size)


def group_by_size(files: Sequence[F], sizes: Sequence[Cover]) -> dict[Cover, list[F]]:
    """The files by the size (height, width) at which they are encoded: the one of ``sizes`` with the nearest aspect
    ratio, or their own. Raises ``UserError`` if ``sizes`` is empty and they differ."""
    found: dict[Cover, list[F]] = {}
    for file in files:
        size = height, width = image_size(file)
        if sizes:
            size = min(sizes, key=lambda wanted: abs(math.log(wanted[0] / wanted[1] * width / height)))
        found.setdefault(size, []).append(file)
        if not sizes and len(found) > 1:
            raise UserError(f"{file} and {files[0]} differ in size; resize them, or set --sizes.")
    return found
