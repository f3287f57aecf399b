"""Tables of images that Hugging Face's ``datasets`` reads: Parquet, WebDataset, saved data sets, the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import reading
from fewstep.core.paths import is_hub_id, nearest_folder

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # by suffix: what reads a file


@dataclass(frozen=True)
class Dataset:
    """A ``datasets.Dataset`` as an ``ImageTableSource``."""

    table: Any

    @property
    def names(self) -> Sequence[str]:
        names: list[str] = self.table.column_names
        return names

    def count(self, column: str) -> int:
        return len(self.table)

    def cells(self, column: str) -> list[Any]:
        return list(self._undecoded(column)[:][column])

    def labels(self, column: str) -> tuple[list[Any], Sequence[str] | None]:
        feature = self.table.features[column]
        return self.cells(column), feature.names if isinstance(feature, require_datasets().ClassLabel) else None

    def images(self, column: str) -> Callable[[int], Any]:
        alone = self._undecoded(column)
        return lambda row: alone[row][column]

    def _undecoded(self, column: str) -> Any:
        """The column alone, images as their files' bytes or paths."""
        datasets, alone = require_datasets(), self.table.select_columns([column])
        if isinstance(self.table.features[column], datasets.Image):
            return alone.cast_column(column, datasets.Image(decode=False))
        return alone


def require_datasets() -> Any:
    """The library ``datasets``. Raises ``UserError`` if it is not installed."""
    if find_spec("datasets") is None:
        raise UserError("This data set needs an extra: pip install 'fewstep[data]'.")
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it reports every local file that is read
    return datasets


def open_dataset(path: str, subset: str | None, split: str) -> Dataset:
    """A Parquet or WebDataset file, a folder of such files or of ``save_to_disk``, or a data set on the hub.

    No code of a data set runs: loading scripts are gone since datasets 4. Raises ``UserError`` if it does not exist or
    cannot be read.
    """
    datasets, place = require_datasets(), Path(path)
    if not place.exists() and not is_hub_id(path):
        raise UserError(f"There is no data set at {path!r}{nearest_folder(place)}.")
    if place.exists() and subset is not None:
        raise UserError(f"subset is for names on the hub, and {path} is on this machine: leave it out.")
    if place.is_file() and split != "train":
        raise UserError(f"{path} is one file, without splits: leave split out.")
    if place.is_file() and place.suffix.lower() not in BUILDERS:
        raise UserError(f"{path} is none of .csv, .jsonl, {', '.join(BUILDERS)}.")
    advice = "Check the file." if place.exists() else "Check its name, its subset and split, and the connection."
    with reading(place, "data set", advice):
        try:
            return Dataset(_load(datasets, path, subset, split))
        except FileNotFoundError as error:  # of what it should contain
            raise ValueError(str(error)) from error


def _load(datasets: Any, path: str, subset: str | None, split: str) -> Any:
    place = Path(path)
    if place.is_file():
        return datasets.load_dataset(BUILDERS[place.suffix.lower()], data_files=escape(path), split="train")
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if split not in parts:
            raise UserError(f"{path} has no split {split!r}{nearest(split, parts)}.")
        return parts[split]
    return datasets.load_dataset(path, subset, split=split)
