"""Damaged sets of images and tables are read or refused with ``UserError``, whatever their bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import image_sets
import numpy as np
import pytest
import torch
from damaged_files import Reader, changed_lines, fuzz, other_arrays
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.core.errors import UserError
from fewstep.core.image_data import ImageData, open_images
from fewstep.core.image_files import to_pixels
from fewstep.core.image_rows import label_numbers
from fewstep.core.tables import read_texts


def opened(folder: Path, name: str, kind: str = "dataset") -> object:
    table = open_images(ImageData(kind, str(folder / name), crop=True), (3, 4, 4))
    return table[torch.arange(len(table))], table.captions


def reader(name: str, create: Any, kind: str = "dataset", **options: Any) -> Reader:
    return Reader(name, create, lambda folder: opened(folder, name, kind), **options)


READERS = {
    "npz": reader("a.npz", image_sets.npz, "npz", others=other_arrays("images", "labels")),
    "csv": reader("a.csv", image_sets.csv, slow=True),
    "jsonl": reader("a.jsonl", image_sets.jsonl, slow=True, others=changed_lines),
    "parquet": reader("a.parquet", image_sets.parquet, slow=True),
    "webdataset": reader("a.tar", image_sets.webdataset, slow=True),
    "texts of a parquet": Reader("a.parquet", image_sets.parquet, lambda f: read_texts(f / "a.parquet")),
    "texts of a jsonl": Reader(
        "a.jsonl", image_sets.jsonl, lambda f: read_texts(f / "a.jsonl", "caption"), changed_lines
    ),
    "texts of a csv": Reader("a.csv", image_sets.csv, lambda f: read_texts(f / "a.csv")),
    "image in a folder": Reader(
        "bee/3.png", lambda f: image_sets.class_folders(f), lambda f: opened(f, ".", "folder"), slow=True
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_set_is_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    counts = fuzz(READERS[name], tmp_path / "set", 500 if READERS[name].slow else 50)
    assert counts.inputs == counts.read + counts.refused
    assert counts.refused > 0


CELLS = st.one_of(st.none(), st.integers(-2, 3), st.booleans(), st.floats(), st.sampled_from(["", "a", "b"]))


@given(st.lists(CELLS, max_size=4))
def test_labels_are_numbers_of_their_classes_or_refused(values: list[Any]) -> None:
    try:
        labels, names = label_numbers(values, lambda row: f"row {row + 1}", "label")
    except UserError as error:
        wrong = values[int(str(error).split(":")[0].removeprefix("row ")) - 1]
        right = type(wrong) is type(values[0]) is str if isinstance(values[0], str) else type(wrong) is int
        assert not right or wrong == "" or wrong < 0
        return
    assert list(names) == sorted(set(names))
    assert [names[label] for label in labels] == values if names else labels.tolist() == values


@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), cover=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([1, 3]), orientation=st.integers(0, 9),
)  # fmt: skip
def test_pixels_of_any_image_have_the_shape_that_is_asked_for(
    mode: str, size: tuple[int, int], cover: tuple[int, int], channels: int, orientation: int
) -> None:
    image = Image.new(mode, size, 1) if mode in ("1", "L", "P", "I", "I;16") else Image.new(mode, size)
    image.getexif()[0x0112] = orientation
    pixels = to_pixels(image, channels, cover)
    assert (pixels.shape, pixels.dtype) == ((channels, *cover), torch.uint8)


def test_opaque_images_keep_their_pixels() -> None:
    """What has no orientation, no transparency and 8 bits is converted as Pillow does."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    with Image.open(stream) as image:
        assert np.array_equal(to_pixels(image).permute(1, 2, 0).numpy(), pixels)
        assert np.array_equal(to_pixels(image, 1)[0].numpy(), np.array(Image.fromarray(pixels).convert("L")))
