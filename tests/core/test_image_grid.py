"""Grids and comparisons of images, pixel by pixel."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.core.errors import UserError
from fewstep.core.image_grid import comparison, image_grid, save_grid


def test_grid_places_every_pixel() -> None:
    """Three 1x2 images in two columns, pixels twice as large, one white pixel between them; the empty cell is white."""
    images = torch.tensor([10, 20, 30, 40, 50, 60], dtype=torch.uint8).reshape(3, 1, 1, 2)
    top = [10, 10, 20, 20, 255, 30, 30, 40, 40]
    bottom = [50, 50, 60, 60, 255, 255, 255, 255, 255]
    grid = image_grid(images, columns=2, scale=2, gap=1)
    assert grid.mode == "L"
    assert np.asarray(grid).tolist() == [top, top, [255] * 9, bottom, bottom]


@pytest.mark.parametrize(("side", "shown"), [(8, 48), (28, 56), (32, 64), (64, 128), (65, 65), (1024, 1024)])
def test_small_images_are_enlarged_until_they_can_be_seen(side: int, shown: int) -> None:
    assert image_grid(torch.zeros(1, 1, side, side, dtype=torch.uint8), columns=1).size == (shown, shown)


def test_grid_keeps_the_colour_channels_in_order() -> None:
    images = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(1, 3, 1, 1)
    grid = image_grid(images, columns=4, scale=1)
    assert (grid.mode, grid.size, grid.getpixel((0, 0))) == ("RGB", (1, 1), (1, 2, 3))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4, dtype=torch.uint8)],
    ids=["floats", "four channels", "none"],
)
def test_grid_refuses_other_shapes_and_types(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        image_grid(images, columns=2)


def test_comparison_keeps_rows_aligned_below_their_labels() -> None:
    """Two rows of two 4x4 images: columns are at the same x, and each row has a label above it."""
    bright, dark = (torch.full((2, 1, 4, 4), value, dtype=torch.uint8) for value in (200, 50))
    pixels = np.asarray(comparison([("teacher, 64 NFE", bright), ("student, 4 NFE", dark)], scale=1, gap=1))
    found = [np.argwhere((pixels == [value, value, value, 255]).all(-1)) for value in (200, 50)]
    for pixel in found:
        assert sorted(set(pixel[:, 1])) == [0, 1, 2, 3, 5, 6, 7, 8]
    first, second = (pixel[:, 0].min() for pixel in found)
    assert second > first + 4
    for start, end in ((0, first), (first + 4, second)):
        assert pixels[start:end, :, 3].any(), "no label"
    assert pixels.shape[1] > 50, "the label is cut"


def test_captions_stand_above_their_columns_in_at_most_four_lines() -> None:
    """The second of three columns has a caption; the rows of images lie below it and are otherwise unchanged."""
    images = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8)
    plain = np.asarray(comparison([("teacher", images)], scale=3))
    heights = {}
    for caption in ("one", "one two three four five six", "one two " * 40):
        pixels = np.asarray(comparison([("teacher", images)], scale=3, captions=["", caption, ""]))
        extra = len(pixels) - len(plain)
        heights[caption] = extra
        assert np.array_equal(pixels[extra:], plain)
        drawn = np.argwhere(pixels[:extra, :, 3])
        assert drawn[:, 1].min() >= 97
        assert drawn[:, 1].max() < 2 * 97
    assert list(heights.values()) == [14 + 6, 2 * 14 + 6, 4 * 14 + 6]


def test_save_grid_writes_the_grid_and_no_other_file(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 1, 6, 6), dtype=torch.uint8)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(image_grid(images, columns=3)))
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_save_grid_refuses_the_name_of_another_type_of_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grid\.jpg: a grid of images is a PNG; name a \.png file"):
        save_grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), tmp_path / "grid.jpg", columns=1)
    assert os.listdir(tmp_path) == []


def test_save_grid_names_a_file_that_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write .*grid\.png"):
        save_grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), tmp_path / "file" / "grid.png", columns=1)
