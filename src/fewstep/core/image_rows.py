"""Images that are not decoded yet, row by row, with their labels: of folders, idx files and .npz files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_prompts, reading
from fewstep.core.idx_files import read_idx
from fewstep.core.image_files import IMAGE_SUFFIXES, EmbeddedImage, ImageFile, list_files
from fewstep.core.tables import choose_column

IMAGE_ARRAYS = ("images", "x_train", "train_images", "arr_0")
UNREAD_SUFFIXES = (".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl")  # images, but not read
LABEL_ARRAYS = ("labels", "y_train", "train_labels", "arr_1")


class Columns(BaseModel):
    """The names of columns, by default the only one with a usual name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    image: str | None = None
    label: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class ImageRows:
    """A set of images. ``open`` returns an image that is not decoded yet (it may raise anything), ``where`` the place
    of a row for messages. ``labels``, int64 [N], come from ``label_column``; they are 0 if there are none, and
    ``class_names`` are empty if they are numbers. ``captions`` are None if a row has none, which ``uncaptioned`` then
    names; this and ``unlabelled`` are also what is wrong if several columns may be meant. ``file`` returns the image
    file of a row, which a table may also hold; ``pixels`` are all images, uint8 [N, C, H, W], if they are arrays."""

    name: str
    open: Callable[[int], Image.Image]
    where: Callable[[int], str]
    labels: Tensor
    labelled: bool
    label_column: str = "label"
    class_names: tuple[str, ...] = ()
    captions: Sequence[str] | None = None
    file: Callable[[int], ImageFile] | None = None
    pixels: Tensor | None = None
    uncaptioned: str | None = None
    unlabelled: str | None = None

    def paths(self) -> list[ImageFile]:
        """The image file of each row, links resolved; empty if the set holds its images. Raises ``UserError`` that
        names a row whose file is missing."""
        if self.file is None or not len(self.labels) or isinstance(self.file(0), EmbeddedImage):
            return []
        files = [self.file(row) for row in range(len(self.labels))]
        return [file.resolve() if isinstance(file, Path) else file for file in files]


def naming(kind: str) -> str:
    """The settings that name a column of images or labels."""
    return f"data.columns.{kind}=NAME, or --{kind} NAME"


def folder_rows(folder: Path) -> ImageRows:
    """The images of a folder: each subfolder is a class, in alphabetical order; without subfolders there are no labels.
    Captions are in text files beside the images (``caption_beside``). Raises ``UserError`` if there are no images, and
    on what would be left out in silence: a subfolder without images, images beside subfolders, and images of another
    type."""
    children = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    classes = [child for child in children if not child.name.startswith(".")]
    read = ", ".join(IMAGE_SUFFIXES)
    if other := [file for place in (folder, *classes) for file in list_files(place, UNREAD_SUFFIXES)]:
        raise UserError(f"{other[0]} is none of {read}: convert it, or move it out of {folder}.")
    images = [list_files(place, IMAGE_SUFFIXES) for place in classes or [folder]]
    if not any(images):
        raise UserError(f"No images ({read}) in {folder} or its subfolders; set data.path.")
    if classes and (beside := list_files(folder, IMAGE_SUFFIXES)):
        raise UserError(
            f"{beside[0]} lies beside the subfolders of {folder}, of which each is a class: move it into one, or out "
            "of this folder."
        )
    if empty := [place for place, files in zip(classes, images, strict=False) if not files]:
        raise UserError(
            f"{empty[0]} contains no images ({read}), and each subfolder of {folder} is a class, with its images "
            "directly inside: correct it, or move it out of this folder."
        )
    found = [(file, k) for k, files in enumerate(images) for file in files]
    files, labels = zip(*found, strict=True)
    captions: list[str] | None = None
    uncaptioned = None
    if any(list_files(place, (".txt",)) for place in classes or [folder]):
        try:
            captions = [caption_beside(file) for file in files]
        except UserError as error:  # which matters to a model of words only
            uncaptioned = str(error)
    return ImageRows(
        str(folder), lambda row: Image.open(files[row]), lambda row: str(files[row]), torch.tensor(labels),
        labelled=bool(classes), label_column="its folder", class_names=tuple(child.name for child in classes),
        captions=captions, file=files.__getitem__, uncaptioned=uncaptioned,
    )  # fmt: skip


def caption_beside(image: Path) -> str:
    """The caption of an image, in a text file of the same name (``a.png`` and ``a.txt``). Raises ``UserError`` if it is
    missing or not one line."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        raise UserError(f"{image} has no caption: {file.name} is missing.")
    prompts = read_prompts(file)
    if len(prompts) != 1:
        raise UserError(f"{file} has {len(prompts)} lines; a caption must be one line.")
    return prompts[0]


def idx_rows(folder: Path, split: str) -> ImageRows:
    """The images of idx files. Raises ``UserError`` if a file is missing or damaged."""
    pixels, labels = read_idx(folder, split)
    return array_rows(str(folder), pixels, labels, labelled=True)


def npz_rows(file: Path, columns: Columns) -> ImageRows:
    """The arrays of an .npz file: images, uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] with 1, 3 or 4 (RGBA) channels,
    and labels, integers or texts [N] or [N, 1]. Nothing is unpickled. Raises ``UserError`` if the file is damaged or an
    array is missing or of another type."""
    with reading(file, ".npz file"):
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array: save it with numpy.savez")
    with reading(file, ".npz file"), arrays:
        image = choose_column(str(file), arrays.files, columns.image, IMAGE_ARRAYS, "image", setting=naming("image"))
        label = choose_column(
            str(file), arrays.files, columns.label, LABEL_ARRAYS, "label", required=False, setting=naming("label")
        )
        images, labels = arrays[str(image)], arrays[label] if label is not None else None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"{file}: {image} must be uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W], got {images.dtype} "
            f"{list(images.shape)}."
        )
    pixels = torch.from_numpy(images[:, None] if images.ndim == 3 else images)
    if images.ndim == 4 and images.shape[-1] in (1, 3, 4):
        pixels = pixels.permute(0, 3, 1, 2)
    elif pixels.shape[1] not in (1, 3):
        raise UserError(f"{file}: {image} has the shape {list(images.shape)}; images have 1, 3 or 4 channels.")
    if labels is None:
        return array_rows(str(file), pixels, torch.zeros(len(pixels), dtype=torch.int64), labelled=False)
    if labels.shape not in ((len(pixels),), (len(pixels), 1)):
        raise UserError(f"{file}: {label} has the shape {list(labels.shape)}, but there are {len(pixels)} images.")
    numbers, names = label_numbers(labels.reshape(-1).tolist(), lambda row: f"{file}, row {row + 1}", str(label))
    return array_rows(str(file), pixels, numbers, True, str(label), names)


def array_rows(
    name: str, pixels: Tensor, labels: Tensor, labelled: bool, column: str = "label", names: tuple[str, ...] = ()
) -> ImageRows:
    """Images in memory: ``pixels``, uint8 [N, C, H, W] with 1, 3 or 4 (RGBA) channels, and ``labels``, int64 [N]."""

    def image(row: int) -> Image.Image:
        values = pixels[row].permute(1, 2, 0).numpy()
        return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)

    def where(row: int) -> str:
        return f"{name}, row {row + 1}"

    return ImageRows(name, image, where, labels, labelled, column, names, pixels=pixels)


def label_numbers(
    values: Sequence[Any], where: Callable[[int], str], column: str, names: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels, int64 [N], and the names of the classes: texts, without space around them, are numbered in alphabetical
    order, whole numbers are kept (they may number ``names``). Raises ``UserError`` that names the row of a label that
    is missing or neither."""
    values = [value.strip() if isinstance(value, str) else value for value in values]
    texts = isinstance(values[0], str) if values else False
    limit = 2**63 if names is None else len(names)
    for row, value in enumerate(values):
        if bool(value) if texts and isinstance(value, str) else not texts and type(value) is int and 0 <= value < limit:
            continue
        raise UserError(
            f"{where(row)}: the column {column} has {'no label' if value in (None, '') else f'the label {value!r}'}; "
            f"labels are all texts, or all whole numbers from 0{f' to {limit - 1}' if names else ''}."
        )
    if not texts:
        return torch.tensor(values, dtype=torch.int64), tuple(names or ())
    classes = sorted(set(values))
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[value] for value in values]), tuple(classes)
