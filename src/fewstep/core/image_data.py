"""Sets of images with labels and captions, from any source: the settings that describe one, and a table of it.

``open_images(ImageData("folder", "photos", crop=True), (3, 64, 64))[rows]`` are pixels and labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import reading
from fewstep.core.idx_files import IDX_FILES
from fewstep.core.image_files import Cover, is_grey, to_pixels, upright_size
from fewstep.core.image_rows import Columns, ImageRows, folder_rows, idx_rows, npz_rows
from fewstep.core.image_tables import table_rows

IN_MEMORY = 2 << 30  # bytes: larger sets are decoded image by image when they are used
KINDS = ("folder", "idx", "npz", "dataset")
CHECK = "Check its path and permissions."
ACTING = {"folder": (), "idx": ("split",), "npz": ("columns",), "dataset": ("columns", "split", "subset")}


@dataclass(frozen=True)
class ImageData:
    """A set of images. ``kind`` and ``path`` are one of

    * ``folder``: images, one subfolder per class in alphabetical order; captions are text files beside them;
    * ``idx``: a folder of idx files (the MNIST family); ``split`` is ``train`` or ``test``;
    * ``npz``: an .npz file of arrays: images, uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], and labels [N];
    * ``dataset``: a table, .csv or .jsonl, that names image files in its folder, or a folder with such a table called
      ``metadata``; with the extra ``data``, also what Hugging Face's ``datasets`` reads: a Parquet file, a WebDataset
      (.tar), a folder of them or of ``save_to_disk``, a name on the hub with its ``subset`` and ``split``.

    ``columns`` names columns or arrays other than the usual ones. With ``crop``, images of another size are scaled,
    keeping their proportions, until they cover the size that is needed, and cropped around their centre; without it,
    they are an error. Raises ``UserError`` on a setting that does not act on the kind.
    """

    kind: str
    path: str
    split: str = "train"
    subset: str | None = None
    columns: Columns = field(default_factory=Columns)
    crop: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"{self.kind!r} is no kind of images{nearest(self.kind, KINDS)}.")
        given = {"split": self.split != "train", "subset": self.subset, "columns": self.columns != Columns()}
        if wrong := [name for name, value in given.items() if value and name not in ACTING[self.kind]]:
            raise UserError(f"{wrong[0]} does not act on kind {self.kind}: leave it out.")
        if self.kind == "idx" and self.split not in ("train", "test"):
            raise UserError(f"split is train or test for kind idx, not {self.split!r}.")
        if self.kind == "npz" and self.columns.caption is not None:
            raise UserError("columns.caption does not act on kind npz: leave it out.")


def kind_of(path: str) -> str:
    """The kind of the images at a path, by what is there. Raises ``UserError`` if that cannot be seen."""
    place = Path(path)
    if place.suffix.lower() == ".npz":
        return "npz"
    with reading(path, "set of images", CHECK):
        if not place.is_dir():
            return "dataset"
        names = {file.name.removesuffix(".gz") for file in place.iterdir()}
    if set(IDX_FILES["train"]) & names:
        return "idx"
    table = any(name.startswith("metadata.") or name.endswith((".parquet", ".tar", ".arrow")) for name in names)
    return "dataset" if table or "dataset_dict.json" in names else "folder"


@dataclass(frozen=True)
class ImageTable:
    """Images of one ``shape`` [C, H, W]. Small sets are ``pixels``, uint8 [N, C, H, W]; of others (None) each image is
    decoded when it is used."""

    rows: ImageRows
    shape: tuple[int, int, int]
    crop: bool = False
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows.labels)

    @property
    def labels(self) -> Tensor:
        """int64 [N]; all 0 if the set has none, as ``labelled`` tells."""
        return self.rows.labels

    @property
    def labelled(self) -> bool:
        return self.rows.labelled

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label; empty if the labels are numbers."""
        return self.rows.class_names

    @property
    def captions(self) -> Sequence[str] | None:
        """The caption of each image, if the set has some."""
        return self.rows.captions

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [n, C, H, W], and labels, int64 [n], of ``rows``, int64 [n]. Raises ``UserError`` that names
        the file or row of an image that is damaged or, without ``crop``, of another size."""
        return self.decode(rows.tolist()) if self.pixels is None else self.pixels[rows], self.labels[rows]

    def decode(self, rows: Sequence[int]) -> Tensor:
        """The same pixels, from their source, by as many threads as torch uses."""
        images = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for place, image in zip(images, pool.map(self._decode, rows), strict=True):
                place.copy_(image)
        return images

    def _decode(self, row: int) -> Tensor:
        channels, *size = self.shape
        where = self.rows.where(row)
        with reading(where, "image"), self.rows.open(row) as image:
            height, width = upright_size(image)
            if self.crop or [height, width] == size:
                return to_pixels(image, channels, (size[0], size[1]))
        raise UserError(
            f"{where} is {width} x {height}, but {size[1]} x {size[0]} is needed: resize it, or crop all images around "
            "their centres (data.crop=true, or --crop)."
        )

    def labels_of(self, classes: int, names: Sequence[str] = ()) -> Tensor:
        """The labels, int64 [N], as those of a model with ``classes`` classes, called ``names`` if it has names: then
        classes belong together by name. Raises ``UserError`` that names the row of a label that the model lacks, and if
        there are no labels although there is a choice."""
        rows = self.rows
        if not self.labelled and classes > 1:
            if rows.unlabelled is not None:
                raise UserError(rows.unlabelled)
            raise UserError(
                f"{rows.name} has no labels, and the model has {classes} classes. Name the column of labels "
                "(data.columns.label=NAME), put the images of each class into a subfolder, or train an unconditional "
                "model (model.classes=0)."
            )
        labels = self.labels
        if self.class_names and names:
            if unknown := [name for name in self.class_names if name not in names]:
                raise UserError(f"{rows.name} has the class {unknown[0]!r}, the model not{nearest(unknown[0], names)}.")
            labels = torch.tensor([names.index(name) for name in self.class_names])[labels]
        elif self.class_names and len(self.class_names) != classes:
            raise UserError(
                f"{rows.name} has {len(self.class_names)} classes ({_listed(self.class_names)}), the model {classes}. "
                f"For a new model, set model.classes={len(self.class_names)}."
            )
        wrong = ((labels < 0) | (labels >= classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise UserError(
                f"{rows.where(row)}: its label ({rows.label_column}) is {int(labels[row])}, which is not one of the "
                f"model's classes, 0 to {classes - 1}."
            )
        return labels


def open_images(data: ImageData, shape: tuple[int, ...] | None = None) -> ImageTable:
    """The set of images that ``data`` describes, at ``shape`` [C, H, W] (C is 1 for grey, 3 for RGB); by default at the
    first image's size, in RGB unless that is grey.

    Labels are read and checked; images of sets up to 2 GiB are decoded at once. Raises ``UserError`` that names what is
    missing, damaged, or of another size.
    """
    rows = _rows(data)
    if not len(rows.labels):
        raise UserError(f"{rows.name} contains no images.")
    wanted = _first_shape(rows) if shape is None else shape
    if len(wanted) != 3 or wanted[0] not in (1, 3):
        raise UserError(f"{rows.name}: images have the shape [1 or 3, H, W], but {list(wanted)} is needed.")
    table = ImageTable(rows, (wanted[0], wanted[1], wanted[2]), data.crop)
    if rows.pixels is not None and tuple(rows.pixels.shape[1:]) == table.shape:
        return ImageTable(rows, table.shape, data.crop, rows.pixels)
    if len(table) * math.prod(table.shape) > IN_MEMORY:
        return table
    return ImageTable(rows, table.shape, data.crop, table.decode(range(len(table))))


def first_shape(data: ImageData) -> tuple[int, ...]:
    """The shape [C, H, W] of the first image. Raises as ``open_images`` does."""
    rows = _rows(data)
    if not len(rows.labels):
        raise UserError(f"{rows.name} contains no images.")
    return _first_shape(rows)


def captions_of(data: ImageData) -> list[str]:
    """The captions of the images. Raises ``UserError`` if they have none."""
    return required_captions(_rows(data))


def required_captions(rows: ImageRows) -> list[str]:
    """The captions of rows. Raises ``UserError`` if there are none, that names a row if others have one."""
    if rows.captions is not None:
        return list(rows.captions)
    if rows.uncaptioned is not None:
        raise UserError(f"{rows.uncaptioned} The model takes words: every image needs a caption.")
    raise UserError(
        f"{rows.name} has no captions, and the model takes words: use a folder with a text file beside each image "
        "(data.kind=folder), or a table with a column of captions (data.kind=dataset), of which "
        "data.columns.caption=NAME names one that is not called caption, prompt or text."
    )


def _rows(data: ImageData) -> ImageRows:
    path = Path(data.path)
    with reading(data.path, "set of images", CHECK):
        if data.kind == "folder":
            return folder_rows(path)
        if data.kind == "idx":
            return idx_rows(path, data.split)
        if data.kind == "npz":
            return npz_rows(path, data.columns)
        return table_rows(data.path, data.subset, data.split, data.columns)


def _first_shape(rows: ImageRows) -> tuple[int, ...]:
    with reading(rows.where(0), "image"), rows.open(0) as image:
        size: Cover = upright_size(image)
        return 1 if is_grey(image) else 3, *size


def _listed(names: Sequence[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
