"""Grids, comparisons and charts: what is drawn, pixel by pixel where that can be said."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.core.errors import UserError
from fewstep.core.image_grid import comparison, grid, save_grid
from fewstep.eval.report.charts import Line, chart


def test_grid_places_every_pixel() -> None:
    """Three 1x2 images in two columns, pixels twice as large, one white pixel between them; the empty cell is white."""
    images = torch.tensor([10, 20, 30, 40, 50, 60], dtype=torch.uint8).reshape(3, 1, 1, 2)
    top = [10, 10, 20, 20, 255, 30, 30, 40, 40]
    bottom = [50, 50, 60, 60, 255, 255, 255, 255, 255]
    picture = grid(images, columns=2, scale=2, gap=1)
    assert picture.mode == "L"
    assert np.asarray(picture).tolist() == [top, top, [255] * 9, bottom, bottom]


def test_grid_keeps_the_colour_channels_in_order() -> None:
    images = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(1, 3, 1, 1)
    picture = grid(images, columns=4, scale=1)
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (1, 1), (1, 2, 3))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4, dtype=torch.uint8)],
    ids=["floats", "four channels", "none"],
)
def test_grid_refuses_what_is_no_picture(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        grid(images, columns=2)


def test_comparison_keeps_rows_aligned_below_their_labels() -> None:
    """Two rows of two 4x4 images: columns stand at the same x, and something is written above each row."""
    bright, dark = (torch.full((2, 1, 4, 4), value, dtype=torch.uint8) for value in (200, 50))
    pixels = np.asarray(comparison([("teacher, 64 NFE", bright), ("student, 4 NFE", dark)], scale=1, gap=1))
    found = [np.argwhere((pixels == [value, value, value, 255]).all(-1)) for value in (200, 50)]
    for places in found:
        assert sorted(set(places[:, 1])) == [0, 1, 2, 3, 5, 6, 7, 8]
    first, second = (places[:, 0].min() for places in found)
    assert second > first + 4
    for start, end in ((0, first), (first + 4, second)):
        assert pixels[start:end, :, 3].any(), "no label"
    assert pixels.shape[1] > 50, "the label is cut"


def test_save_grid_writes_what_grid_draws_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 1, 6, 6), dtype=torch.uint8)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(grid(images, columns=3)))
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_save_grid_names_the_place_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write .*grid\.png"):
        save_grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), tmp_path / "file" / "grid.png", columns=1)


def test_chart_is_a_part_of_a_page_without_addresses_and_always_the_same() -> None:
    lines = [Line("teacher <euler>", [(4, 20.0), (8, 1.0)], "o-"), Line("student $x_$", [(4, 2.5)], "D")]
    caption, svg = chart("fd", "NFE", lines, log_x=True)
    assert (caption, svg) == chart("fd", "NFE", lines, log_x=True)
    assert svg.startswith("<svg viewBox=")
    assert "http" not in svg
    assert "fd against NFE: teacher &lt;euler&gt; from 20 to 1; student $x_$ from 2.5 to 2.5" in svg
    assert "currentColor" in svg
    assert "#123456" not in svg


def test_chart_of_many_points_stays_small_and_keeps_the_extremes() -> None:
    """100,000 points with one spike: a text of some 20 kB, whose y axis reaches the spike."""
    points = [(float(step), 100.0 if step == 77_777 else 1.0) for step in range(100_000)]
    svg = chart("loss/match", "step", [Line("loss/match", points)]).svg
    assert len(svg) < 40_000
    assert ">100</text>" in svg
