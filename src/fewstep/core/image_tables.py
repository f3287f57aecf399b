"""Images of tables: CSV and JSON lines, and what Hugging Face's ``datasets`` reads (``core.image_datasets``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fewstep.core.errors import UserError
from fewstep.core.image_files import IMAGE_SUFFIXES, EmbeddedImage, ImageFile, open_image
from fewstep.core.image_rows import Columns, ImageRows, label_numbers, naming
from fewstep.core.paths import file_inside
from fewstep.core.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column, read_cells, table_columns

LABELS = ("label", "labels", "class", "cls")
CAPTIONS = (*CAPTION_COLUMNS, "txt")
TEXT_SUFFIXES = (".csv", ".jsonl")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
WHOLE = re.compile("[-+]?[0-9]{1,18}")
METADATA = tuple(f"metadata{suffix}" for suffix in TEXT_SUFFIXES)


class ImageTableSource(Protocol):
    """A table of images: the ``names`` of its columns, and their cells."""

    @property
    def names(self) -> Sequence[str]: ...

    def count(self, column: str) -> int:
        """The number of rows."""
        ...

    def cells(self, column: str) -> list[Any]:
        """All cells of a column."""
        ...

    def labels(self, column: str) -> tuple[list[Any], Sequence[str] | None]:
        """All labels, and the names that they number, if these are known."""
        ...

    def images(self, column: str) -> Callable[[int], Any]:
        """A function that returns the cell of an image in a row: a file's bytes, or its name; or both."""
        ...


@dataclass(frozen=True)
class TextTable:
    """A CSV or JSON-lines file. Labels of a CSV file are numbers if all of them are written as numbers."""

    file: Path

    @property
    def names(self) -> Sequence[str]:
        return table_columns(self.file)

    def count(self, column: str) -> int:
        return len(self.cells(column))

    def cells(self, column: str) -> list[Any]:
        return [cell for (cell,) in read_cells(self.file, (column,))]

    def labels(self, column: str) -> tuple[list[Any], None]:
        cells = self.cells(column)
        texts = [str(cell or "").strip() for cell in cells]
        if self.file.suffix.lower() == ".csv" and all(NUMBER.fullmatch(text) for text in texts):
            return [int(text) if WHOLE.fullmatch(text) else float(text) for text in texts], None
        return cells, None

    def images(self, column: str) -> Callable[[int], Any]:
        return self.cells(column).__getitem__


def table_rows(path: str, subset: str | None, split: str, columns: Columns) -> ImageRows:
    """The images of a table or data set. Raises ``UserError`` if it does not exist, cannot be read, or lacks a
    column."""
    place = Path(path)
    file = next((place / name for name in METADATA if (place / name).is_file()), place)
    table: ImageTableSource
    if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES:
        if subset is not None or split != "train":
            raise UserError(f"{file} is one table, so it has neither subset nor split: leave them out.")
        table = TextTable(file)
    else:
        from fewstep.core.image_datasets import open_dataset  # needs the extra

        table = open_dataset(path, subset, split)
    return _rows(str(file), file.parent if file.is_file() else place, table, columns)


def _rows(name: str, folder: Path, table: ImageTableSource, columns: Columns) -> ImageRows:
    def where(row: int) -> str:
        return f"{name}, row {row + 1}"

    def optional(wanted: str | None, usual: Sequence[str], kind: str, setting: str) -> tuple[str | None, str | None]:
        """A column, if there is one, or why it is not known which: not everybody needs it."""
        try:
            return choose_column(name, names, wanted, usual, kind, required=False, setting=setting), None
        except UserError as error:
            if wanted is not None:
                raise
            return None, str(error)

    names = table.names
    image = str(choose_column(name, names, columns.image, IMAGE_COLUMNS, "image", setting=naming("image")))
    label, unlabelled = optional(columns.label, LABELS, "label", naming("label"))
    caption, uncaptioned = optional(columns.caption, CAPTIONS, "caption", "data.columns.caption=NAME")
    captions: Sequence[str] | None = None
    if caption is not None:
        captions, uncaptioned = _captions(table.cells(caption), where, caption)
    if uncaptioned is not None and columns.caption is not None:
        raise UserError(uncaptioned)
    cell = table.images(image)

    def file(row: int) -> ImageFile:
        return _file(cell(row), folder, where(row), image)

    if label is None:
        labels, classes = torch.zeros(table.count(image), dtype=torch.int64), tuple[str, ...]()
    else:
        values, known = table.labels(label)
        labels, classes = label_numbers(values, where, label, known)
    return ImageRows(
        name, lambda row: open_image(file(row)), where, labels, label is not None, label or "label", classes, captions,
        file, uncaptioned=uncaptioned, unlabelled=unlabelled,
    )  # fmt: skip


def _captions(
    values: Sequence[Any], where: Callable[[int], str], column: str
) -> tuple[Sequence[str] | None, str | None]:
    """The captions, one text per row; or, if a row has none, which one."""
    wrong = next((row for row, value in enumerate(values) if not isinstance(value, str) or not value.strip()), None)
    if wrong is not None:
        return None, f"{where(wrong)}: the column {column} has no text."
    return [value.strip() for value in values], None


def _file(cell: Any, folder: Path, where: str, column: str) -> ImageFile:
    """The image file in a cell: bytes, the path that ``datasets`` gave to a file, or a name in the table's folder."""
    if isinstance(cell, dict) and cell.get("bytes") is None and isinstance(cell.get("path"), str):
        cell = cell["path"]
        if Path(cell).is_absolute() and Path(cell).is_file():
            return Path(cell)
    elif isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, bytes):
        content = cell
        return EmbeddedImage(where, lambda: content)
    if isinstance(cell, str) and folder.is_dir():
        return file_inside(folder, cell, IMAGE_SUFFIXES, where)
    raise UserError(f"{where}: the column {column} has no image, but {str(cell)[:80]!r}.")
