"""Images from disk: all forms of storage, and all defects."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.image_grid import save_sample
from fewstep.eval.image_sources import is_image_set, natural_key
from fewstep.eval.images import Crop, ImageSet, InMemoryImages


def pixels(n: int = 5, height: int = 12, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def png(array: np.ndarray, **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", **settings)  # type: ignore[arg-type]
    return buffer.getvalue()


def folder(tmp_path: Path, images: np.ndarray) -> Path:
    root = tmp_path / "images"
    (root / "deeper").mkdir(parents=True)
    for k, image in enumerate(images):
        (root / ("deeper" if k % 2 else "") / f"{k}.png").write_bytes(png(image))
    (root / "notes.txt").write_text("not an image")
    return root


def zipped(tmp_path: Path, images: np.ndarray) -> Path:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for k, image in enumerate(images):
            archive.writestr(f"{k}.png", png(image))
    return tmp_path / "images.zip"


def tarred(tmp_path: Path, images: np.ndarray) -> Path:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for k, image in enumerate(images):
            content = png(image)
            info = tarfile.TarInfo(f"{k}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return tmp_path / "images.tar"


def array(tmp_path: Path, images: np.ndarray) -> Path:
    np.savez(tmp_path / "images.npz", arr_0=images)
    return tmp_path / "images.npz"


def read(images: ImageSet, size: int = 2) -> Tensor:
    return torch.stack([image for batch in images.batches(lambda image: image, size) for image in batch])


@pytest.mark.parametrize("store", [folder, zipped, tarred, array])
def test_images_are_read_in_order_of_names(store: Callable[[Path, np.ndarray], Path], tmp_path: Path) -> None:
    images = pixels()
    source = store(tmp_path, images)
    assert is_image_set(source)
    opened = ImageSet.open(source)
    order = [int(Path(name).stem) for name in opened.names]
    assert sorted(order) == list(range(5))
    assert opened.names == sorted(opened.names, key=natural_key)
    torch.testing.assert_close(read(opened), torch.from_numpy(images[order]).permute(0, 3, 1, 2))
    assert len(read(ImageSet.open(source, count=3))) == 3


def test_videos_are_read_frame_by_frame(tmp_path: Path) -> None:
    shades = (torch.arange(4, dtype=torch.uint8) * 60)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    for name in "ab":
        save_sample(shades, tmp_path / f"{name}.gif")
    videos = read(ImageSet.open(tmp_path, frames=4))
    assert videos.shape == (2, 4, 3, 8, 8)
    assert (videos[0].int() - shades.int()).abs().max() <= 3


def test_a_crop_is_the_resized_centred_square() -> None:
    image = Image.fromarray(pixels(1, 20, 31)[0])
    expected = image.crop((5, 0, 25, 20)).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(np.array(Crop(8)(image)), np.array(expected))
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    ((cropped,),) = InMemoryImages([batch], Crop(8)).batches(lambda image: image)
    assert np.array_equal(cropped.permute(1, 2, 0).numpy(), np.array(expected))


def test_grey_images_are_repeated_and_an_opaque_alpha_is_dropped(tmp_path: Path) -> None:
    grey = pixels(1)[0, :, :, 0]
    opaque = np.dstack([pixels(1, seed=1)[0], np.full((12, 12), 255, np.uint8)])
    (tmp_path / "a.png").write_bytes(png(grey))
    (tmp_path / "b.png").write_bytes(png(opaque))
    images = read(ImageSet.open(tmp_path))
    assert np.array_equal(images[0].numpy(), np.broadcast_to(grey, (3, 12, 12)))
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), opaque[..., :3])


BAD = {
    "a damaged file": (b"\x89PNG nothing", "damaged or not an image"),
    "half a file": (png(pixels(1, 64, 64)[0])[:2000], "damaged or not an image"),
    "transparency": (png(np.dstack([pixels(1)[0], np.full((12, 12), 128, np.uint8)])), "partly transparent"),
    "16 bits": (png(np.full((12, 12), 40_000, np.uint16)), "not 8 bits per channel"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_image_is_refused_with_its_name_or_left_out(name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    for k, image in enumerate(pixels(3)):
        (tmp_path / f"{k}.png").write_bytes(png(image))
    for bad in ("5.png", "6.png"):
        (tmp_path / bad).write_bytes(content)
    with pytest.raises(UserError, match=rf"5\.png cannot be scored: .*{reason}.* \(2 such images so far\)"):
        read(ImageSet.open(tmp_path), size=8)
    images = ImageSet.open(tmp_path, skip_bad=True)
    assert len(read(images)) == 3
    assert set(images.done.skipped) == {"5.png", "6.png"}
    assert images.scored_count == 3


def test_images_of_several_sizes_are_kept_and_a_crop_makes_them_equal(tmp_path: Path) -> None:
    for k, side in enumerate((12, 20)):
        (tmp_path / f"{k}.png").write_bytes(png(pixels(1, side, 12)[0]))
    assert read(ImageSet.open(tmp_path, Crop(8))).shape == (2, 3, 8, 8)
    (sizes,) = ImageSet.open(tmp_path).batches(lambda image: tuple(image.shape))
    assert sizes == [(3, 12, 12), (3, 20, 12)]


def test_sources_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"no zip")
    np.savez(tmp_path / "a.npz", np.zeros((2, 3)))
    for name, message in (
        ("empty", "contains no images"),
        ("a.zip", r"a\.zip is not a readable .*not a zip file"),
        ("a.npz", r"must contain uint8 images \[N, H, W, 3\]"),
        ("missing", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            ImageSet.open(tmp_path / name)
