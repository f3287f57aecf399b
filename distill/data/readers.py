"""Files of labelled samples: idx files, folders of images, safetensors."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, reading
from fewstep.core.image_files import IMAGE_SUFFIXES, list_files, read_image, to_unit
from fewstep.distill.data.sources import Stored

PACKAGE = Path(__file__).resolve().parents[2]
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


def read_stored(file: Path, classes: int) -> Stored:
    """A safetensors file with ``labels`` [N] and other tensors [N, ...]; uint8 ``images`` become ``x0`` in [-1, 1].

    A path that does not exist may name a file of the package (``eval/reference/fashion/real.safetensors``). Raises
    ``UserError`` if it does not, or if the file's contents are wrong.
    """
    found = next((path for path in (file, PACKAGE / file) if path.is_file()), None)
    if found is None:
        raise UserError(
            f"data.path = {file} was not found. fewstep data ode-pairs and fewstep data preferences create such files."
        )
    tensors = read_tensors(found)
    if "images" in tensors:
        tensors["x0"] = to_unit(tensors.pop("images"))
    labels = tensors.pop("labels", None)
    shapes = {tensor.shape for tensor in tensors.values()}
    if labels is None or labels.ndim != 1 or len(shapes) != 1 or next(iter(shapes))[:1] != labels.shape:
        raise UserError(
            f"{file} must contain labels and samples, equally many and all of one shape. Create it with fewstep data."
        )
    if not len(labels) or labels.is_floating_point() or labels.is_complex() or not all_finite(tensors.values()):
        raise UserError(f"{file} needs at least one sample, labels that are integers, and finite, real samples.")
    if not ((labels >= 0) & (labels < classes)).all():
        raise UserError(f"{file} has labels outside 0..{classes - 1}, the classes of the model.")
    return Stored({name: tensor.float() for name, tensor in tensors.items()}, labels.long(), classes)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(not tensor.is_complex() and bool(tensor.isfinite().all()) for tensor in tensors)


def read_folder(folder: str | Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images of ``shape`` [C, H, W] as uint8 [N, C, H, W], and labels int64 [N].

    Each subfolder is a class, in alphabetical order; images in ``folder`` itself are all of class 0. Raises
    ``UserError`` that names the first file that is damaged or of another size.
    """
    root = Path(folder)
    classes = sorted(child for child in root.iterdir() if child.is_dir()) if root.is_dir() else []
    files = [(file, k) for k, child in enumerate(classes or [root]) for file in list_files(child, IMAGE_SUFFIXES)]
    if not files:
        raise UserError(f"No images ({', '.join(IMAGE_SUFFIXES)}) in {folder} or its subfolders; set data.path.")
    channels, height, width = shape
    images = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
    for row, (file, _) in enumerate(files):
        image = read_image(file, channels)
        if image.shape[1:] != (height, width):
            raise UserError(
                f"{file} is {image.shape[2]} x {image.shape[1]}, the model needs {width} x {height}: resize it."
            )
        images[row] = image
    return images, torch.tensor([label for _, label in files])
