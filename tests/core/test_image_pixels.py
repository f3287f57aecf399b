"""Pixels of image files: size, orientation, transparency, bits and channels are handled as documented."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from image_sets import FORMS, class_folders
from PIL import Image

from fewstep.core.errors import UserError
from fewstep.core.image_data import ImageData, open_images


def refused(data: ImageData, shape: tuple[int, ...] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_images(data, shape)
    return str(caught.value)


def one(folder: Path, content: bytes, shape: tuple[int, ...] | None = None, crop: bool = False) -> torch.Tensor:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(content)
    return open_images(ImageData("folder", str(folder), crop=crop), shape)[torch.tensor([0])][0][0]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_transparent_pixels_are_composited_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 100, [255, 51, 0]  # alpha 1, 0.2, 0
    image = one(tmp_path, encoded(Image.fromarray(rgba)), (3, 1, 3))
    assert image[0, 0].tolist() == [100, 224, 255]  # 0.2 * 100 + 0.8 * 255
    assert image[1, 0].tolist() == [0, 204, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([7, 7, 7, 9, 9, 9])
    assert one(tmp_path, encoded(palette, transparency=1), (1, 1, 2)).flatten().tolist() == [7, 255]
    assert one(tmp_path, encoded(palette), (3, 1, 2))[2, 0].tolist() == [7, 9]


def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 65_535, 32_896]], np.uint16)
    image = one(tmp_path, encoded(Image.fromarray(values)))
    assert (image.shape, image.flatten().tolist()) == ((1, 1, 6), [0, 0, 1, 1, 255, 128])


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    assert "a.png is not a readable image (its pixels are floating-point" in refused(ImageData("folder", str(tmp_path)))


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    content = encoded(Image.fromarray(np.array([[10, 20, 30]], np.uint8)), exif=exif)
    image = one(tmp_path, content)
    assert (image.shape, image.flatten().tolist()) == ((1, 3, 1), [10, 20, 30])


def test_grey_and_colour_are_converted(tmp_path: Path) -> None:
    red = encoded(Image.new("RGB", (2, 2), (255, 0, 0)))
    assert one(tmp_path, red, (1, 2, 2)).unique().tolist() == [76]  # ITU-R 601: 0.299 * 255
    grey = encoded(Image.new("L", (2, 2), 9))
    assert one(tmp_path, grey, (3, 2, 2)).unique().tolist() == [9]
    assert one(tmp_path, grey).shape == (1, 2, 2)
    assert "[4, 2, 2] is needed" in refused(ImageData("folder", str(tmp_path)), (4, 2, 2))


def test_cropping_scales_to_cover_and_takes_the_centre(tmp_path: Path) -> None:
    columns = np.repeat(np.arange(0, 80, 10, dtype=np.uint8)[None], 4, 0)  # 4 x 8
    assert one(tmp_path, encoded(Image.fromarray(columns)), (1, 4, 4), crop=True)[0, 0].tolist() == [20, 30, 40, 50]
    blocks = Image.fromarray(np.kron(np.array([[0, 50, 100, 150]], np.uint8), np.ones((16, 16), np.uint8)))  # 16 x 64
    halved = one(tmp_path, encoded(blocks), (1, 8, 8), crop=True)
    assert halved[0, :, 2].float().mean() == pytest.approx(50, abs=2)
    assert halved[0, :, 5].float().mean() == pytest.approx(100, abs=2)
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (5, 3))))
    assert "a.png is 5 x 3, but 4 x 3 is needed: resize it, or crop" in refused(
        ImageData("folder", str(tmp_path)), (1, 3, 4)
    )


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_every_form_is_cropped_and_converted_alike(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    by_form = open_images(replace(FORMS[form](tmp_path), crop=True), (1, 2, 2))
    by_file = open_images(replace(class_folders(tmp_path / "set"), crop=True), (1, 2, 2))
    assert by_form[torch.arange(5)][0].equal(by_file[torch.tensor([1, 3, 2, 0, 4])][0])
