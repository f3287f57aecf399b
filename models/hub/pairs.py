"""Preference pairs of image files, named by a table, encoded beside their prompts: ``winner`` and ``loser`` latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fewstep.core.errors import UserError
from fewstep.core.image_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Cover
from fewstep.core.paths import file_inside
from fewstep.core.tables import read_table
from fewstep.models.hub.encode import (
    Progress,
    encode_prompts,
    group_by_size,
    latents_of,
    require_vae,
    source_hash,
    write_shards,
)
from fewstep.models.hub.folder import PipelineFolder

COLUMNS = ("winner", "loser", "caption")


class FilePair(NamedTuple):
    """A preferred and a rejected file for one prompt."""

    winner: Path
    loser: Path
    caption: str


def read_pairs(table: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[FilePair]:
    """The pairs in a table (.csv with a header, or .jsonl) with the columns winner, loser and caption; the files are
    relative to its folder.

    Raises ``UserError`` that names the row if a file is missing, outside the folder (also through a link) or of another
    type, if winner and loser are one file, or if a caption has several lines.
    """
    pairs = []
    for number, (*names, caption) in enumerate(read_table(table, COLUMNS), start=1):
        where = f"{table}, row {number}"
        winner, loser = (file_inside(table.parent, name, suffixes, where) for name in names)
        if winner.resolve() == loser.resolve():
            raise UserError(f"{where}: winner and loser are one file, {names[0]}.")
        if len(caption.strip().splitlines()) != 1:
            raise UserError(f"{where}: a caption must be one line.")
        pairs.append(FilePair(winner, loser, caption.strip()))
    return pairs


@torch.no_grad()
def encode_pairs(
    folder: PipelineFolder, table: Path, out: Path, *, sizes: Sequence[Cover] = (), frames: int = 1, batch: int = 32,
    rows: int = 512, device: torch.device | str = "cpu", progress: Progress | None = None,
) -> int:  # fmt: skip
    """Encodes the pairs of a table (see ``read_pairs``) and their captions. Returns the number of pairs.

    ``sizes`` and ``frames`` are those of ``encode_images``; both samples of a pair get the size nearest to the winner.
    Existing shards are kept. Raises ``UserError`` as ``read_pairs`` does, and on files that are damaged or, without
    ``sizes``, of several sizes.
    """
    require_vae(folder)
    pairs = read_pairs(table, VIDEO_SUFFIXES if frames > 1 else IMAGE_SUFFIXES)
    prompts = list(dict.fromkeys(pair.caption for pair in pairs))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    files = [file for pair in pairs for file in (pair.winner, pair.loser)]
    size_of = {file: size for size, same in group_by_size(files, sizes).items() for file in same}
    buckets: dict[Cover, list[FilePair]] = {}
    for pair in pairs:
        buckets.setdefault(size_of[pair.winner], []).append(pair)
    for height, width in buckets:
        folder.family.shape(height, width, frames)  # raises if the model does not support the size
    encode_prompts(
        folder, prompts, out, device=device, rows=rows, pairs=len(pairs), sizes=tuple(sizes),
        source=source_hash(folder, files, [pair.caption for pair in pairs], frames),
    )  # fmt: skip
    pipeline = folder.pipeline().to(device)

    def encoded(piece: Sequence[FilePair], size: Cover) -> dict[str, torch.Tensor]:
        winner, loser = (
            latents_of(folder, pipeline, same, frames, size, batch)
            for same in ([pair.winner for pair in piece], [pair.loser for pair in piece])
        )
        return {"winner": winner, "loser": loser, "prompt": torch.tensor([number[pair.caption] for pair in piece])}

    write_shards(out, "pairs", buckets, rows, encoded, progress)
    return len(pairs)
