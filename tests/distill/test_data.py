"""Sources of batches as functions of keyed random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.core.image_data import ImageTable
from fewstep.core.image_files import to_bytes, to_unit
from fewstep.core.image_rows import array_rows
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Source
from fewstep.distill.data.sources import Images, Labels
from fewstep.models.condition import LabelRows


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
    return images_of(numbers[:, None, None, None].expand(8, 1, 2, 2), numbers.long() % 3)


def images_of(pixels: Tensor, labels: Tensor, classes: int = 3, flip: bool = False) -> Images:
    rows = array_rows("numbers", pixels, labels, labelled=True)
    return Images(ImageTable(rows, (1, *pixels.shape[2:]), pixels=pixels), LabelRows(labels, classes), flip)


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


def test_flipped_samples_are_half_of_all_and_depend_on_the_key_alone() -> None:
    pixels = torch.tensor([[0, 100, 200], [10, 20, 30]], dtype=torch.uint8)[:, None, None]
    plain, flipped = (images_of(pixels, torch.arange(2), flip=flip) for flip in (False, True))
    key = KeyedRandom(0, 0, "data", 0)
    before, after = plain(key, 1000)["x0"], flipped(KeyedRandom(0, 0, "data", 0), 1000)["x0"]
    mirrored = (after == before.flip(-1)).flatten(1).all(1)
    assert ((after == before).flatten(1).all(1) ^ mirrored).all()
    assert 440 < mirrored.sum() < 560  # 3.8 standard deviations
    assert flipped(KeyedRandom(0, 0, "data", 0), 1000)["x0"].equal(after)
    assert not flipped(KeyedRandom(0, 1, "data", 0), 1000)["x0"].equal(after)


@pytest.mark.parametrize(
    "make",
    [lambda: Labels(0, (1, 2, 2)), lambda: images_of(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4), 0)],
    ids=["labels", "images"],
)
def test_data_of_an_unconditional_model_have_an_empty_condition(make: Callable[[], Source]) -> None:
    batch = make()(KeyedRandom(0, 0, "data", 0), 5)
    assert (batch.size, dict(batch.condition), batch.condition.nulls) == (5, {}, {})
