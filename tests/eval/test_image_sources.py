"""Which files of a folder or archive are scored, which are left out, and what is said about them."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.image_sources import is_image_set, list_images
from fewstep.eval.images import Crop, ImageSet


def pixels(n: int = 3, side: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "png", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(array: np.ndarray, **settings: object) -> bytes:
    return encoded(Image.fromarray(array), **settings)


def folder(root: Path, n: int = 3) -> Path:
    root.mkdir()
    for k, image in enumerate(pixels(n)):
        (root / f"{k}.png").write_bytes(png(image))
    return root


def read(images: ImageSet) -> list[Tensor]:
    return [image for batch in images.batches(lambda image: image, 2) for image in batch]


def test_numbered_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", 12)
    assert ImageSet.open(root).names == [f"{k}.png" for k in range(12)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x10/b2.png", "x9/b10.png", "x9/b9.png"):
            archive.writestr(name, png(pixels(1)[0]))
    assert list_images(tmp_path / "a.zip").names == ["x9/b9.png", "x9/b10.png", "x10/b2.png"]


def test_every_file_of_a_folder_that_is_left_out_is_listed(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    outside = folder(tmp_path / "outside")
    for suffix in ("tif", "ppm", "gif"):
        Image.fromarray(pixels(1)[0]).save(root / f"x.{suffix}")
    (root / "linked").symlink_to(outside)
    (root / "x.png").mkdir()
    images = ImageSet.open(root)
    assert images.names == ["0.png", "1.png", "2.png"]
    assert images.left_out == {
        "x.tif": "files of type .tif are not read", "x.ppm": "files of type .ppm are not read",
        "x.gif": "files of type .gif are not read", "linked": "linked folders are not followed",
        "x.png": "it is a folder",
    }  # fmt: skip
    read(images)
    (remark,) = images.remarks()
    assert "5 files left out: " in remark
    assert "x.tif (files of type .tif are not read)" in remark


def test_members_of_one_name_and_links_in_a_tar_are_left_out_and_listed(tmp_path: Path) -> None:
    first, last = pixels(2)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for image in (first, last):
            info = tarfile.TarInfo("0.png")
            info.size = len(png(image))
            archive.addfile(info, io.BytesIO(png(image)))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(link)
    images = ImageSet.open(tmp_path / "a.tar")
    (shown,) = read(images)
    assert np.array_equal(shown.permute(1, 2, 0).numpy(), last), "what unpacking would leave"
    assert images.left_out == {
        "0.png (1)": "an earlier member of the same name", "1.png": "it is not a regular file"
    }  # fmt: skip


def test_frames_after_the_first_are_counted(tmp_path: Path) -> None:
    frames = [Image.fromarray(image) for image in pixels(3)]
    (tmp_path / "0.webp").write_bytes(
        encoded(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True)
    )
    images = ImageSet.open(tmp_path)
    assert len(read(images)) == 1
    assert images.done.further_frames == {"0.webp": 2}
    assert "2 further frames of 1 images not used" in images.remarks()[0]


def test_fewer_images_than_asked_are_refused_and_more_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", 5)
    Image.fromarray(pixels(1)[0]).save(root / "5.tif")
    with pytest.raises(UserError, match=r"5 scorable images, 6 are required.*1 file left out: 5\.tif"):
        ImageSet.open(root, count=6)
    images = ImageSet.open(root, count=3)
    assert len(read(images)) == 3
    assert "2 of 5 images not needed" in " ".join(images.remarks())


def test_a_bad_image_is_replaced_by_the_next_one_if_it_is_skipped(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", 6)
    (root / "1.png").write_bytes(b"no")
    images = ImageSet.open(root, skip_bad=True, count=5)
    assert len(read(images)) == 5
    assert set(images.done.skipped) == {"1.png"}
    (root / "5.png").unlink()
    with pytest.raises(UserError, match="4 scorable images, 5 are required"):
        read(ImageSet.open(root, skip_bad=True, count=5))


def broken_link(root: Path) -> Path:
    (root / "9.png").symlink_to(root / "nowhere.png")
    return root


def unreadable_type(root: Path) -> Path:
    os.mkfifo(root / "pipe")  # a name without a suffix is left out, not opened
    (root / "9.png").write_bytes(b"GIF89a" + bytes(20))
    return root


def bomb(root: Path) -> Path:
    (root / "9.png").write_bytes(encoded(Image.new("1", (30_000, 12_000))))
    return root


def bad_crc(root: Path) -> Path:
    file = root.with_suffix(".zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for image in sorted(root.iterdir()):
            archive.write(image, image.name)
        archive.writestr("9.png", png(pixels(1)[0]))
    content = bytearray(file.read_bytes())
    content[content.index(b"9.png") + 40] ^= 0xFF
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("damage", [broken_link, unreadable_type, bomb, bad_crc])
def test_whatever_makes_a_file_unreadable_it_is_named_or_skipped(
    damage: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = damage(folder(tmp_path / "a"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(UserError, match=r"9\.png cannot be scored: ") as error:
            read(ImageSet.open(source))
        images = ImageSet.open(source, skip_bad=True)
        assert len(read(images)) == 3
    assert set(images.done.skipped) == {"9.png"}
    assert "object at 0x" not in str(error.value)


def png_of_16_bits() -> bytes:
    """A 1 x 1 RGB PNG of 48 bits, which Pillow opens as 8-bit RGB."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + bytes([1, 2, 3, 4, 5, 6]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def palette(transparency: object) -> bytes:
    return encoded(Image.fromarray(pixels(1)[0]).quantize(4), transparency=transparency)


KEY = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_of_16_bits(), "16 bits"),
        (png(KEY, transparency=(0, 0, 0)), "partly transparent"),
        (palette(0), "partly transparent"),
        (palette(bytes([255, 128, 255, 255])), "partly transparent"),
        (b"nothing", "its format is unknown"),
    ],
    ids=["48-bit RGB", "colour key", "palette with a transparent colour", "palette with alpha", "no image"],
)
def test_pixels_that_would_be_changed_silently_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"0\.png cannot be scored: .*{reason}"):
        read(ImageSet.open(tmp_path))


def test_a_transparency_that_no_pixel_has_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(KEY, transparency=(1, 2, 3)))
    (tmp_path / "1.png").write_bytes(palette(bytes([255] * 4)))
    assert len(read(ImageSet.open(tmp_path))) == 2


def test_the_hash_of_a_set_is_that_of_its_pixels_in_order(tmp_path: Path) -> None:
    images = pixels(3)
    root = folder(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for k, image in enumerate(images):
            archive.writestr(f"other{k}.bmp", encoded(Image.fromarray(image), "bmp"))
    np.savez(tmp_path / "a.npz", images)

    def digest(source: Path, crop: Crop | None = None) -> str:
        opened = ImageSet.open(source, crop)
        read(opened)
        return opened.sha256

    assert digest(root) == digest(tmp_path / "a.zip") == digest(tmp_path / "a.npz")
    assert digest(root, Crop(8)) != digest(root) != digest(root, Crop(8, "box"))
    np.savez(tmp_path / "b.npz", images[::-1])
    assert digest(tmp_path / "b.npz") != digest(root)


def test_archives_are_known_by_any_spelling_and_messages_say_what_is_wrong(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "X.ZIP", "w") as archive:
        archive.write(root / "0.png", "0.PNG")
    assert is_image_set(tmp_path / "X.ZIP")
    assert len(ImageSet.open(tmp_path / "X.ZIP").names) == 1
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive_of_all:
        archive_of_all.add(root)
    assert is_image_set(tmp_path / "x.tar.gz")
    with pytest.raises(UserError, match="compressed as a whole"):
        ImageSet.open(tmp_path / "x.tar.gz")
    for empty in ("empty.npz", "empty.zip", "empty.tar"):
        (tmp_path / empty).touch()
        with pytest.raises(UserError, match=rf"{empty} (is not a readable folder|contains no images)"):
            ImageSet.open(tmp_path / empty)
    with pytest.raises(UserError, match=r"no\.zip does not exist"):
        ImageSet.open(tmp_path / "no.zip")
    assert torch.equal(read(ImageSet.open(tmp_path / "X.ZIP"))[0], read(ImageSet.open(root))[0])
