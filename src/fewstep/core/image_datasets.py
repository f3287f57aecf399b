"""Images of Hugging Face's ``datasets``: Parquet, CSV and JSON lines, WebDataset, folders with metadata, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import reading
from fewstep.core.image_files import IMAGE_SUFFIXES, EmbeddedImage, ImageFile, open_image
from fewstep.core.image_rows import Columns, ImageRows, label_numbers
from fewstep.core.paths import file_inside, is_hub_id, nearest_folder
from fewstep.core.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column

LABELS = ("label", "labels", "class", "cls")
CAPTIONS = (*CAPTION_COLUMNS, "txt")
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),  # NA and None are texts
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}), ".jsonl": ("json", {}), ".parquet": ("parquet", {}), ".tar": ("webdataset", {}),
}  # by suffix: what reads a file  # fmt: skip


def dataset_rows(path: str, subset: str | None, split: str, columns: Columns) -> ImageRows:
    """The rows of a data set. Raises ``UserError`` if it does not exist, cannot be read, or lacks a column."""
    table = _load(path, subset, split)
    folder = _folder(Path(path))

    def where(row: int) -> str:
        return f"{path}, row {row + 1}"

    image = str(choose_column(path, table.column_names, columns.image, IMAGE_COLUMNS, "image"))
    label = choose_column(path, table.column_names, columns.label, LABELS, "label", required=False)
    caption = choose_column(path, table.column_names, columns.caption, CAPTIONS, "caption", required=False)
    labels, names = torch.zeros(len(table), dtype=torch.int64), tuple[str, ...]()
    if label is not None:
        known = getattr(table.features[label], "names", None)  # of a ClassLabel
        labels, names = label_numbers(_values(table, label), where, label, known)
    captions = None if caption is None else _captions(_values(table, caption), path, caption, columns.caption)
    cells = _undecoded(table, image)

    def file(row: int) -> ImageFile:
        return _file(cells[row][image], folder, where(row), image)

    return ImageRows(
        path, lambda row: open_image(file(row)), where, labels, label is not None, label or "label", names, captions,
        file,
    )  # fmt: skip


def require_datasets() -> Any:
    """The library ``datasets``. Raises ``UserError`` if it is not installed."""
    if find_spec("datasets") is None:
        raise UserError("This data set needs an extra: pip install 'fewstep[data]'.")
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it reports every local file that is read
    return datasets


def _load(path: str, subset: str | None, split: str) -> Any:
    """A ``datasets.Dataset``. No code of a data set runs: loading scripts are gone since datasets 4."""
    datasets, place = require_datasets(), Path(path)
    if not place.exists() and not is_hub_id(path):
        raise UserError(f"There is no data set at {path!r}{nearest_folder(place)}.")
    if place.exists() and subset is not None:
        raise UserError(f"subset is for names on the hub, and {path} is on this machine: leave it out.")
    if place.is_file() and split != "train":
        raise UserError(f"{path} is one file, without splits: leave split out.")
    if place.is_file() and place.suffix.lower() not in BUILDERS:
        raise UserError(f"{path} is none of {', '.join(BUILDERS)}.")
    advice = "Check the file." if place.exists() else "Check its name, its subset and split, and the connection."
    with reading(place, "data set", advice):
        try:
            return _read(datasets, path, subset, split)
        except FileNotFoundError as error:  # of what it should contain
            raise ValueError(str(error)) from error


def _read(datasets: Any, path: str, subset: str | None, split: str) -> Any:
    place = Path(path)
    if place.is_file():
        builder, settings = BUILDERS[place.suffix.lower()]
        return datasets.load_dataset(builder, data_files=escape(path), split="train", **settings)
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if split not in parts:
            raise UserError(f"{path} has no split {split!r}{nearest(split, parts)}.")
        return parts[split]
    if place.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in place.rglob("*")):
        return datasets.load_dataset("imagefolder", data_dir=path, split=split)
    return datasets.load_dataset(path, subset, split=split)


def _folder(place: Path) -> Path | None:
    """Where the files lie that a table names."""
    return place if place.is_dir() else place.parent if place.is_file() else None


def _values(table: Any, column: str) -> list[Any]:
    return list(table.select_columns([column])[:][column])


def _captions(values: Sequence[Any], path: str, column: str, wanted: str | None) -> Sequence[str] | None:
    """The captions, one text per row; None if a column that nobody named holds something else."""
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
    if wrong and wanted is not None:
        raise UserError(f"{path}, row {wrong[0] + 1}: the column {column} has no text.")
    return None if wrong else [value.strip() for value in values]


def _undecoded(table: Any, column: str) -> Any:
    """The column of images, with their files' bytes or paths as cells."""
    datasets = require_datasets()
    alone = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        return alone.cast_column(column, datasets.Image(decode=False))
    return alone


def _file(cell: Any, folder: Path | None, where: str, column: str) -> ImageFile:
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
    if isinstance(cell, str) and folder is not None:
        return file_inside(folder, cell, IMAGE_SUFFIXES, where)
    raise UserError(f"{where}: the column {column} has no image, but {str(cell)[:80]!r}.")
