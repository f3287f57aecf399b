"""Data: idx files of the MNIST family, folders of images, and sources as functions of keyed random numbers."""

from __future__ import annotations

import gzip
import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.image_files import to_bytes, to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Source
from fewstep.distill.data.readers import IDX_FILES, read_folder, read_idx
from fewstep.distill.data.sources import Images, Labels

IMAGES_FILE, LABELS_FILE = IDX_FILES["train"]


def idx(values: list[int] | bytes, *shape: int) -> bytes:
    """The idx format: two zero bytes, 8 for uint8, the number of axes, the axes big-endian, the numbers."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(values)


def write(folder: Path, images: bytes, labels: bytes, split: str = "train") -> None:
    for name, content in zip(IDX_FILES[split], (images, labels), strict=True):
        (folder / name).write_bytes(content)


# ---- idx files


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


# ---- pixels


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 1)])
def test_each_subfolder_of_an_image_folder_is_a_class(mode: str, channels: int, tmp_path: Path) -> None:
    for label, name in enumerate(("boot", "shirt")):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("L", (4, 3), 100 * label + k).convert(mode).save(tmp_path / name / f"{k}.png")
    (tmp_path / "boot" / "notes.txt").write_text("no image")
    images, labels = read_folder(tmp_path, (channels, 3, 4))
    assert labels.tolist() == [0, 0, 1, 1]
    assert images.shape == (4, channels, 3, 4)
    if mode != "P":
        assert [int(image.max()) for image in images] == [0, 1, 100, 101]
    flat, classes = read_folder(tmp_path / "shirt", (channels, 3, 4))
    assert (len(flat), classes.tolist()) == (2, [0, 0])


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No images"):
        read_folder(tmp_path / "none", (1, 3, 4))
    Image.new("L", (5, 3)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is 5 x 3, the model needs 4 x 3"):
        read_folder(tmp_path, (1, 3, 4))
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        read_folder(tmp_path, (1, 3, 4))


def test_bytes_survive_the_unit_interval() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(every)
    assert (unit.min().item(), unit.max().item(), unit.dtype) == (-1, 1, torch.float32)
    assert to_bytes(unit).equal(every)
    assert to_bytes(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]


# ---- sources


def numbered() -> Images:
    """Eight images, each of its own number; the label is the number modulo 3."""
    numbers = torch.arange(8, dtype=torch.uint8)
    return Images(numbers[:, None, None, None].expand(8, 1, 2, 2), numbers.long() % 3, classes=3)


def sampled(source: Source, step: int = 0, shard: int = 0) -> list[Tensor]:
    batch = source(KeyedRandom(0, step, "data", shard), 32)
    return [*batch.condition.tensors.values(), *batch.tensors.values()]


@pytest.mark.parametrize("make", [lambda: Labels(3, (1, 2, 2)), numbered], ids=["labels", "images"])
def test_a_batch_is_a_function_of_its_key(make: Callable[[], Source]) -> None:
    first = sampled(make())
    assert all(a.equal(b) for a, b in zip(first, sampled(make()), strict=True))
    for other in (sampled(make(), step=1), sampled(make(), shard=1)):
        assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("make", [lambda: Labels(3, (1, 2, 2)), numbered], ids=["labels", "images"])
def test_labels_are_classes_and_the_null_label_is_the_number_of_classes(make: Callable[[], Source]) -> None:
    batch = make()(KeyedRandom(0, 0, "data", 0), 32)
    assert (batch.size, batch.shape) == (32, (1, 2, 2))
    assert batch.condition["labels"].unique().tolist() == [0, 1, 2]
    assert batch.condition.null()["labels"].tolist() == [3] * 32


def test_images_keep_their_labels_and_all_of_them_are_sampled() -> None:
    batch = numbered()(KeyedRandom(0, 0, "data", 0), 200)
    numbers = to_bytes(batch["x0"])[:, 0, 0, 0].long()
    assert numbers.unique().tolist() == list(range(8))
    assert batch.condition["labels"].equal(numbers % 3)
    assert (batch["x0"].shape, batch["x0"].dtype) == ((200, 1, 2, 2), torch.float32)


def test_a_batch_of_labels_has_no_images() -> None:
    assert dict(Labels(3, (1, 2, 2))(KeyedRandom(0, 0, "data", 0), 4)) == {}


def test_all_tensors_of_a_batch_move_to_a_device() -> None:
    batch = numbered()(KeyedRandom(0, 0, "data", 0), 4).to(torch.device("meta"))
    assert {tensor.device.type for tensor in [batch["x0"], batch.condition["labels"]]} == {"meta"}
    assert (batch.size, batch.shape) == (4, (1, 2, 2))
