"""Sets of images in batches: from a folder, a zip or tar archive, an .npz file of one array, or memory."""

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
from fewstep.core.image_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_video

ARCHIVES = (".zip", ".tar", ".npz")
OPAQUE_MODES = ("1", "L", "RGB", "P", "CMYK", "YCbCr", "LAB", "HSV")
TRANSPARENT = "it is partly transparent; composite it onto a background first"
BATCH = 16  # with 64, Inception on a CPU takes a sixth longer per image: its activations no longer fit the cache
Filter = Literal["bicubic", "lanczos", "bilinear", "box"]


@dataclass(frozen=True)
class Crop:
    """Crops an image to its largest centred square, resizes it to ``size`` and rounds."""

    size: int
    filter: Filter = "lanczos"

    def __call__(self, image: Image.Image) -> Image.Image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((self.size, self.size), Image.Resampling[self.filter.upper()])


T = TypeVar("T")


class Images(Protocol):
    """A source of images in batches."""

    def batches(self, transform: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]: ...


class UnscorableImage(Exception):
    """The reason why an image cannot be scored."""


@dataclass
class ImageSet:
    """Images on disk by name. After a pass, ``skipped`` holds the names that were left out, with the reasons."""

    source: Path
    names: list[str]
    load: Callable[[str], bytes | np.ndarray]
    crop: Crop | None = None
    skip_bad: bool = False
    frames: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def open(
        source: Path, crop: Crop | None = None, skip_bad: bool = False, limit: int | None = None,
        frames: int | None = None,
    ) -> ImageSet:  # fmt: skip
        """The images, or with ``frames`` the videos of a folder, in order of their names; at most ``limit``.

        Raises ``UserError`` if there are none.
        """
        names, load = _list_images(source, VIDEO_SUFFIXES if frames else IMAGE_SUFFIXES)
        if not names:
            raise UserError(f"{source} contains no {'videos' if frames else 'images'}.")
        return ImageSet(source, names[:limit], load, crop, skip_bad, frames)

    def batches(self, transform: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]:
        """``transform`` of every image, uint8 [3, H, W], or video, uint8 [F, 3, H, W], in order. Images are decoded,
        cropped and transformed by as many threads as torch uses, one batch ahead of the caller.

        Raises ``UserError`` that names unscorable images (damaged, transparent, more than 8 bits) and counts them,
        unless ``skip_bad`` is set.
        """
        self.skipped.clear()
        parts = [self.names[low : low + size] for low in range(0, len(self.names), size)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            work = partial(self._load_image, transform)
            pending = pool.map(work, parts[0])
            for names, next_names in zip(parts, [*parts[1:], []], strict=True):
                results = list(pending)
                pending = pool.map(work, next_names)
                for name, result in zip(names, results, strict=True):
                    if isinstance(result, UnscorableImage):
                        self.skipped[name] = str(result)
                self._check_skipped()
                yield [result for result in results if not isinstance(result, UnscorableImage)]

    @property
    def scored_count(self) -> int:
        """The number of images that the last pass returned."""
        return len(self.names) - len(self.skipped)

    def _check_skipped(self) -> None:
        if self.skipped and not self.skip_bad:
            name, reason = next(iter(self.skipped.items()))
            count = f" ({len(self.skipped)} such images so far)" if len(self.skipped) > 1 else ""
            raise UserError(
                f"{self.source}: {name} cannot be scored: {reason}{count}. --skip-bad leaves such images out."
            )

    def _load_image(self, transform: Callable[[Tensor], T], name: str) -> T | UnscorableImage:
        try:
            if self.frames:
                image = read_video(self.source / name, self.frames).transpose(0, 1)
            else:
                image = torch.from_numpy(_decode(self.load(name), self.crop)).permute(2, 0, 1)
        except (UserError, UnscorableImage) as error:
            return UnscorableImage(str(error))
        return transform(image)


def _decode(content: bytes | np.ndarray, crop: Crop | None) -> np.ndarray:
    """uint8 [H, W, 3]; grey is repeated. Raises ``UnscorableImage``."""
    if isinstance(content, bytes):
        try:
            image: Image.Image = Image.open(io.BytesIO(content))
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise UnscorableImage(f"it is damaged or not an image ({error})") from error
    else:
        image = Image.fromarray(content)
    if image.mode not in OPAQUE_MODES:
        if image.mode not in ("RGBA", "LA", "PA"):
            raise UnscorableImage(f"its pixels are {image.mode}, not 8 bits per channel")
        if image.getchannel("A").getextrema()[0] != 255:
            raise UnscorableImage(TRANSPARENT)
    if image.mode == "P" and "transparency" in image.info:
        raise UnscorableImage(TRANSPARENT)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(crop(rgb) if crop else rgb)


def is_image_set(source: Path) -> bool:
    """Whether ``source`` is an archive, or a folder that is neither a run, a model nor a pipeline."""
    models = ("config.yaml", "config.json", "model_index.json")
    if source.is_dir():
        return not any((source / name).is_file() for name in models)
    return source.suffix in ARCHIVES


def _list_images(source: Path, suffixes: tuple[str, ...]) -> tuple[list[str], Callable[[str], bytes | np.ndarray]]:
    """The sorted names, and a function that loads one."""
    try:
        if source.is_dir():
            files = (file.relative_to(source) for file in source.rglob("*") if file.suffix.lower() in suffixes)
            return sorted(map(str, files)), lambda name: (source / name).read_bytes()
        if source.suffix == ".zip":
            zipped = zipfile.ZipFile(source)  # thread-safe for reading
            return sorted(name for name in zipped.namelist() if _has_image_suffix(name)), zipped.read
        if source.suffix == ".tar":
            with tarfile.open(source) as archive:
                members = (member for member in archive if member.isfile() and _has_image_suffix(member.name))
                ranges = {member.name: (member.offset_data, member.size) for member in members}
            return sorted(ranges), lambda name: _read_range(source, *ranges[name])
        if source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as arrays:
                images = arrays[arrays.files[0]]
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise UserError(f"{source} must contain uint8 images [N, H, W, 3], got {images.dtype} {images.shape}.")
            return [str(k) for k in range(len(images))], lambda name: images[int(name)]
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{source} cannot be read ({error}).") from error
    raise UserError(f"{source} is neither a folder of images nor an archive ({', '.join(ARCHIVES)}).")


def _has_image_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _read_range(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


@dataclass(frozen=True)
class InMemoryImages:
    """Images in memory, in parts uint8 [N, C, H, W] (or videos [N, F, 3, H, W]); prepared as by ``ImageSet``."""

    parts: Iterable[Tensor]
    crop: Crop | None = None

    def batches(self, transform: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]:
        """``transform`` of every image, as in ``ImageSet``."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for part in self.parts:
                for batch in part.cpu().split(size):
                    yield list(pool.map(lambda image: transform(self._prepare(image)), batch))

    def _prepare(self, image: Tensor) -> Tensor:
        if image.ndim == 3 and len(image) == 1:
            image = image.expand(3, -1, -1)
        if self.crop is None:
            return image
        cropped = self.crop(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)
