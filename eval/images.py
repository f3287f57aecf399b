"""Sets of images from disk, a batch at a time: a folder, a zip or tar archive, or an .npz of one array."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.image_files import PICTURES, VIDEOS, read_video

ARCHIVES = (".zip", ".tar", ".npz")
GREYS, COLOURS = ("1", "L"), ("RGB", "P", "CMYK", "YCbCr", "LAB", "HSV")
BATCH = 16  # with 64, Inception takes a sixth longer an image on a CPU: its maps leave the cache
Filter = Literal["bicubic", "lanczos", "bilinear", "box"]


@dataclass(frozen=True)
class Crop:
    """What is done to an image before a metric sees it: the largest centred square, resized to ``size`` and rounded."""

    size: int
    filter: Filter = "lanczos"

    def __call__(self, picture: Image.Image) -> Image.Image:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        return square.resize((self.size, self.size), Image.Resampling[self.filter.upper()])


T = TypeVar("T")


class Images(Protocol):
    """Where images come from, a batch at a time."""

    def batches(self, each: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]: ...


class Bad(Exception):
    """Why an image is none that can be scored."""


@dataclass
class ImageSet:
    """Images by name. ``skipped`` tells, after a pass, which were left out and why."""

    source: Path
    names: list[str]
    read: Callable[[str], bytes | np.ndarray]
    crop: Crop | None = None
    skip_bad: bool = False
    frames: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def open(
        source: Path,
        crop: Crop | None = None,
        skip_bad: bool = False,
        most: int | None = None,
        frames: int | None = None,
    ) -> ImageSet:
        """The images, all or the first ``most``, by name or, with ``frames``, a folder's videos.

        Raises ``UserError`` if there are none.
        """
        names, read = _listed(source, VIDEOS if frames else PICTURES)
        if not names:
            raise UserError(f"{source} has no {'videos' if frames else 'images'}.")
        return ImageSet(source, names[:most], read, crop, skip_bad, frames)

    def batches(self, each: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]:
        """``each`` of every image, uint8 [3, H, W], or video, uint8 [F, 3, H, W], in order; decoded, cropped and passed
        to ``each`` by as many threads as torch uses, a batch ahead of the caller.

        Raises ``UserError`` that names bad images (corrupt, transparent, of more than 8 bits) and counts them, unless
        they are to be skipped.
        """
        self.skipped.clear()
        parts = [self.names[low : low + size] for low in range(0, len(self.names), size)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            work = partial(self._image, each)
            following = pool.map(work, parts[0])
            for names, after in zip(parts, [*parts[1:], []], strict=True):
                done = list(following)
                following = pool.map(work, after)
                self.skipped |= {name: str(one) for name, one in zip(names, done, strict=True) if isinstance(one, Bad)}
                self._refuse()
                yield [one for one in done if not isinstance(one, Bad)]

    @property
    def read_count(self) -> int:
        """How many images the last pass gave."""
        return len(self.names) - len(self.skipped)

    def _refuse(self) -> None:
        if self.skipped and not self.skip_bad:
            name, why = next(iter(self.skipped.items()))
            more = f" ({len(self.skipped)} such images so far)" if len(self.skipped) > 1 else ""
            raise UserError(f"{self.source}: {name} cannot be scored: {why}{more}. --skip-bad leaves such images out.")

    def _image(self, each: Callable[[Tensor], T], name: str) -> T | Bad:
        try:
            if self.frames:
                image = read_video(self.source / name, self.frames).transpose(0, 1)
            else:
                image = torch.from_numpy(_pixels(self.read(name), self.crop)).permute(2, 0, 1)
        except (UserError, Bad) as error:
            return Bad(str(error))
        return each(image)


def _pixels(content: bytes | np.ndarray, crop: Crop | None) -> np.ndarray:
    """uint8 [H, W, 3]; grey is repeated. Raises ``Bad``."""
    if isinstance(content, bytes):
        try:
            picture: Image.Image = Image.open(io.BytesIO(content))
            picture.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise Bad(f"it is damaged or no image ({error})") from error
    else:
        picture = Image.fromarray(content)
    if picture.mode not in (*GREYS, *COLOURS):
        if picture.mode not in ("RGBA", "LA", "PA"):
            raise Bad(f"its pixels are {picture.mode}, not 8 bits a channel")
        if picture.getchannel("A").getextrema()[0] != 255:
            raise Bad("it is transparent in places: lay it on a background first")
    if picture.mode == "P" and "transparency" in picture.info:
        raise Bad("it is transparent in places: lay it on a background first")
    colour = picture if picture.mode == "RGB" else picture.convert("RGB")
    return np.array(crop(colour) if crop else colour)


def is_image_set(source: Path) -> bool:
    """Whether it is an archive, or a folder that is no run, no model and no pipeline."""
    models = ("config.yaml", "config.json", "model_index.json")
    if source.is_dir():
        return not any((source / name).is_file() for name in models)
    return source.suffix in ARCHIVES


def _listed(source: Path, suffixes: tuple[str, ...]) -> tuple[list[str], Callable[[str], bytes | np.ndarray]]:
    """Names in order, and what reads one."""
    try:
        if source.is_dir():
            files = (file.relative_to(source) for file in source.rglob("*") if file.suffix.lower() in suffixes)
            return sorted(map(str, files)), lambda name: (source / name).read_bytes()
        if source.suffix == ".zip":
            zipped = zipfile.ZipFile(source)  # several threads may read from it
            return sorted(name for name in zipped.namelist() if _is_picture(name)), zipped.read
        if source.suffix == ".tar":
            with tarfile.open(source) as archive:
                places = {m.name: (m.offset_data, m.size) for m in archive if m.isfile() and _is_picture(m.name)}
            return sorted(places), lambda name: _span(source, *places[name])
        if source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as arrays:
                images = arrays[arrays.files[0]]
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise UserError(f"{source}: uint8 images [N, H, W, 3] are wanted, got {images.dtype} {images.shape}.")
            return [str(k) for k in range(len(images))], lambda name: images[int(name)]
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{source} cannot be read ({error}).") from error
    raise UserError(f"{source} is no folder of images and no archive ({', '.join(ARCHIVES)}).")


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURES


def _span(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


@dataclass(frozen=True)
class InMemoryImages:
    """Images that are there already, in parts uint8 [N, C, H, W] (or videos), as an ``ImageSet`` gives them."""

    parts: Iterable[Tensor]
    crop: Crop | None = None

    def batches(self, each: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for part in self.parts:
                for batch in part.cpu().split(size):
                    yield list(pool.map(lambda image: each(self._colour(image)), batch))

    def _colour(self, image: Tensor) -> Tensor:
        if image.ndim == 3 and len(image) == 1:
            image = image.expand(3, -1, -1)
        if self.crop is None:
            return image
        picture = self.crop(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
