"""Reading idx files, in which the data sets of the MNIST family are published."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import reading

MAX_BYTES = 1 << 33
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(folder: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, H, W] and labels int64 [N] from the idx files of the MNIST family, plain or gzipped.

    Raises ``UserError`` if a file is missing or damaged.
    """
    images, labels = (_read_idx_file(Path(folder), name) for name in IDX_FILES[split])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(f"{folder}: images {list(images.shape)} and labels {list(labels.shape)} do not match.")
    return images[:, None], labels.long()


def _read_idx_file(folder: Path, name: str) -> Tensor:
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise UserError(
            f"No {name}.gz in {str(folder)!r}. Set data.path to the folder with the four Fashion-MNIST idx files "
            "(Debian's package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist)."
        )
    with reading(file, "idx file"), gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        zero, kind, axes = struct.unpack(">HBB", stream.read(4))
        shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
        size = math.prod(shape)
        if (zero, kind) != (0, 8) or not 0 < size <= MAX_BYTES:
            raise ValueError(f"its header is that of no array of 1 to {MAX_BYTES:,} bytes")
        content = bytearray(stream.read(size + 1))  # a bomb expands no further
        if len(content) != size:
            raise ValueError("its header does not match its length")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
