"""Idx files: read as written, damage is named."""

from __future__ import annotations

import gzip
import math
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.core.errors import UserError
from fewstep.core.idx_files import IDX_FILES, read_idx

IMAGES_FILE, LABELS_FILE = IDX_FILES["train"]


def idx(values: list[int] | bytes, *shape: int) -> bytes:
    """The idx format: two zero bytes, 8 for uint8, the number of axes, the axes big-endian, the numbers."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(values)


def write(folder: Path, images: bytes, labels: bytes, split: str = "train") -> None:
    for name, content in zip(IDX_FILES[split], (images, labels), strict=True):
        (folder / name).write_bytes(content)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    data=st.data(),
    zipped=st.booleans(),
    split=st.sampled_from(["train", "test"]),
)
def test_idx_files_are_read_as_they_were_written(
    shape: tuple[int, int, int], data: st.DataObject, zipped: bool, split: str
) -> None:
    pixels = data.draw(st.binary(min_size=math.prod(shape), max_size=math.prod(shape)))
    labels = data.draw(st.lists(st.integers(0, 255), min_size=shape[0], max_size=shape[0]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, idx(pixels, *shape), idx(labels, shape[0]), split)
        if zipped:
            for file in list(folder.iterdir()):
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        read_images, read_labels = read_idx(folder, split)
    assert (read_images.shape, read_images.dtype) == ((shape[0], 1, *shape[1:]), torch.uint8)
    assert bytes(read_images.flatten().tolist()) == pixels
    assert (read_labels.tolist(), read_labels.dtype) == (labels, torch.int64)


GOOD = idx(range(12), 3, 2, 2), idx([0, 1, 2], 3)


@pytest.mark.parametrize(
    "images",
    [
        GOOD[0][:-1],
        GOOD[0] + b"x",
        GOOD[0][:6],
        b"",
        b"\x00\x00",
        b"<html>404</html>",
        struct.pack(">HBB3I", 0, 9, 3, 3, 2, 2) + bytes(12),
        struct.pack(">HBB3I", 1, 8, 3, 3, 2, 2) + bytes(12),
        idx([], 0, 2, 2),
    ],
    ids=["short", "long", "cut header", "empty", "two bytes", "html", "other type", "other magic", "no images"],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_damaged_files_are_named(tmp_path: Path, images: bytes, zipped: bool) -> None:
    write(tmp_path, *GOOD)
    file = tmp_path / (IMAGES_FILE + ".gz" * zipped)
    file.write_bytes(gzip.compress(images) if zipped else images)
    with pytest.raises(UserError, match="is not a readable idx file") as caught:
        read_idx(tmp_path)
    assert str(file) in str(caught.value)


def test_no_damage_to_a_gz_file_goes_unnoticed(tmp_path: Path) -> None:
    """Every byte flipped in turn, every length cut: an error that names the file, or the correct images."""
    write(tmp_path, *GOOD)
    truth, _ = read_idx(tmp_path)
    complete = gzip.compress(GOOD[0])
    flipped = [complete[:i] + bytes([complete[i] ^ 0x55]) + complete[i + 1 :] for i in range(len(complete))]
    file = tmp_path / f"{IMAGES_FILE}.gz"
    refused = 0
    for damaged in [*flipped, *(complete[:i] for i in range(len(complete)))]:
        file.write_bytes(damaged)
        try:
            images = read_idx(tmp_path)[0]
        except UserError as error:
            refused += str(file) in str(error)
        else:
            assert images.equal(truth)
    assert refused > 1.5 * len(complete)


@pytest.mark.parametrize(
    ("images", "labels"),
    [(GOOD[0], idx([0, 1], 2)), (idx(range(12), 12), GOOD[1]), (GOOD[0], idx([0, 1, 2], 3, 1))],
)
def test_images_and_labels_that_do_not_match_are_refused(tmp_path: Path, images: bytes, labels: bytes) -> None:
    write(tmp_path, images, labels)
    with pytest.raises(UserError, match="do not match") as caught:
        read_idx(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_error_for_a_missing_file_names_a_place_to_find_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"No {IMAGES_FILE}.gz in '{tmp_path}'. Set data.path"):
        read_idx(tmp_path)
