"""Images as tensors: value ranges, and reading of image and video files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, ImageSequence
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import reading

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".gif")
Cover = tuple[int, int]


@dataclass(frozen=True)
class EmbeddedImage:
    """An image file in a table; ``where`` names its row in messages, ``read`` returns its bytes."""

    where: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.where


ImageFile = Path | EmbeddedImage
SIDEWAYS = range(5, 9)  # EXIF orientations in which height and width change places


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x0: Tensor) -> Tensor:
    """[-1, 1] (clamped) -> uint8 0..255, rounded."""
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(x0: Tensor) -> Tensor:
    """Samples in [-1, 1] (clamped) as they are shown, uint8: images [N, C, H, W] in the same layout, and videos
    [N, C, F, H, W] frame by frame, [N, F, C, H, W]."""
    pixels = to_bytes(x0)
    return pixels.transpose(1, 2) if pixels.ndim == 5 else pixels


def list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder with these suffixes, by name: neither hidden ones nor those of its subfolders."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(file for file in found if file.suffix.lower() in suffixes and not file.name.startswith("."))


def file_bytes(file: ImageFile) -> bytes:
    return file.read() if isinstance(file, EmbeddedImage) else file.read_bytes()


def open_image(file: ImageFile) -> Image.Image:
    """An image that is not decoded yet."""
    return Image.open(io.BytesIO(file.read()) if isinstance(file, EmbeddedImage) else file)


def read_image(file: ImageFile, channels: int = 3, cover: Cover | None = None) -> Tensor:
    """An image, uint8 [channels, H, W], grey (1) or RGB (3). With ``cover`` (height, width) it is scaled, keeping its
    proportions, until it covers that size, and cropped around its centre. See ``to_pixels`` for what is converted.

    Raises ``UserError`` that names a damaged file.
    """
    with reading(file, "image"), open_image(file) as image:
        return to_pixels(image, channels, cover)


def to_pixels(image: Image.Image, channels: int = 3, cover: Cover | None = None) -> Tensor:
    """The pixels of an image, uint8 [channels, H, W], grey (1) or RGB (3), with ``cover`` as for ``read_image``.

    It is turned upright as its EXIF data specify, transparent pixels are composited on white, palettes are resolved,
    16 bits are rounded to 8, and of several frames the first is taken. Raises ``ValueError`` on floating-point pixels
    and on more than 16 bits.
    """
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    pixels = _covering(image.convert("L" if channels == 1 else "RGB"), cover)
    return torch.from_numpy(np.array(pixels)).reshape(pixels.height, pixels.width, channels).permute(2, 0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colours, by its type."""
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def upright_size(image: Image.Image) -> Cover:
    """Height and width of an image, turned upright as its EXIF data specify, from its header."""
    sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def image_size(file: ImageFile) -> Cover:
    """Height and width of an image or video file, from its header. Raises ``UserError`` that names a damaged file."""
    with reading(file, "image or video"):
        if isinstance(file, Path) and file.suffix.lower() == ".mp4":
            require_av()
            import av

            with av.open(str(file)) as container:
                return container.streams.video[0].height, container.streams.video[0].width
        with open_image(file) as opened:
            return upright_size(opened)


def read_video(file: Path, frames: int, cover: Cover | None = None) -> Tensor:
    """The first ``frames`` frames of a GIF or MP4, uint8 [3, frames, H, W]; ``cover`` as for ``read_image``.

    Raises ``UserError`` that names a damaged or shorter file, or what MP4 needs.
    """
    with reading(file, "video"):
        shown = [np.array(_covering(frame, cover)) for frame in islice(_frames(file), frames)]
    if len(shown) < frames:
        raise UserError(f"{file} has {len(shown)} frames, {frames} are needed.")
    return torch.from_numpy(np.stack(shown)).permute(3, 0, 1, 2)


def has_av() -> bool:
    """Whether PyAV, which reads and writes MP4, is installed."""
    return find_spec("av") is not None


def require_av() -> None:
    """Raises ``UserError`` if PyAV is not installed."""
    if not has_av():
        raise UserError("MP4 needs an extra: pip install 'fewstep[video]'; or use GIF.")


def _frames(file: Path) -> Iterator[Image.Image]:
    if file.suffix.lower() == ".gif":
        with Image.open(file) as opened:
            for frame in ImageSequence.Iterator(opened):
                yield frame.convert("RGB")
        return
    require_av()
    import av

    with av.open(str(file)) as container:
        for decoded in container.decode(video=0):
            yield decoded.to_image()


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of integers with at most 16 bits as one of 8 bits; any other of 8 bits as it is."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("its pixels have more than 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _covering(pixels: Image.Image, cover: Cover | None) -> Image.Image:
    if cover is None or (pixels.height, pixels.width) == cover:
        return pixels
    scale = max(cover[0] / pixels.height, cover[1] / pixels.width)
    height, width = max(cover[0], round(scale * pixels.height)), max(cover[1], round(scale * pixels.width))
    top, left = (height - cover[0]) // 2, (width - cover[1]) // 2
    scaled = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + cover[1], top + cover[0]))
