"""Sets of images in batches: on disk (see ``image_sources``) or in memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.image_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_video
from fewstep.eval.image_sources import describe_left_out, list_images

TRANSPARENT = "it is partly transparent; composite it onto a background first"
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
BATCH = 16  # with 64, Inception on a CPU takes a sixth longer per image: its activations no longer fit the cache
Filter = Literal["bicubic", "lanczos", "bilinear", "box"]


def centre_square(image: Image.Image) -> Image.Image:
    """The largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Crop:
    """Crops an image to its largest centred square, resizes it to ``size`` and rounds."""

    size: int
    filter: Filter = "lanczos"

    def __call__(self, image: Image.Image) -> Image.Image:
        return centre_square(image).resize((self.size, self.size), Image.Resampling[self.filter.upper()])


T = TypeVar("T")


class Images(Protocol):
    """A source of images in batches."""

    def batches(self, transform: Callable[[Tensor], T], size: int = BATCH) -> Iterator[list[T]]: ...


class UnscorableImage(Exception):
    """The reason why an image cannot be scored."""


class LoadedImage(NamedTuple):
    """The result of a transform, the hash of the pixels, and the number of frames that were not used."""

    result: Any
    digest: bytes
    further_frames: int


@dataclass
class Pass:
    """What a pass over an ``ImageSet`` has done so far: how many names it took, the hashes of the images' pixels, the
    reasons why images were skipped, and how many frames after the first were not used, by name."""

    taken: int = 0
    digests: list[bytes] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    further_frames: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, image: LoadedImage | UnscorableImage) -> None:
        self.taken += 1
        if isinstance(image, UnscorableImage):
            self.skipped[name] = str(image)
            return
        self.digests.append(image.digest)
        if image.further_frames:
            self.further_frames[name] = image.further_frames


@dataclass
class ImageSet:
    """Images on disk by name. ``left_out`` holds files that are no images, with the reasons; ``done`` the last pass."""

    source: Path
    names: list[str]
    load: Callable[[str], bytes | np.ndarray]
    crop: Crop | None = None
    skip_bad: bool = False
    count: int | None = None
    frames: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    done: Pass = field(default_factory=Pass)

    @staticmethod
    def open(
        source: Path, crop: Crop | None = None, skip_bad: bool = False, count: int | None = None,
        frames: int | None = None,
    ) -> ImageSet:  # fmt: skip
        """The images, or with ``frames`` the videos of a folder, in natural order of their names; exactly the first
        ``count``, or all.

        Raises ``UserError`` if there are none, or fewer than ``count``.
        """
        names, load, left_out = list_images(source, VIDEO_SUFFIXES if frames else IMAGE_SUFFIXES)
        images = ImageSet(source, names, load, crop, skip_bad, count, frames, left_out)
        if not names:
            remark = describe_left_out(left_out)
            kind = "videos" if frames else "images"
            raise UserError(f"{source} contains no {kind}{f' ({remark})' if remark else ''}.")
        images._check_count(len(names))
        return images

    def batches(
        self, transform: Callable[[Tensor], T], size: int = BATCH, resumed: Pass | None = None
    ) -> Iterator[list[T]]:
        """``transform`` of every image, uint8 [3, H, W], or video, uint8 [F, 3, H, W], in order; after a ``resumed``
        pass, of those that it has not taken. Images are decoded, cropped and transformed by as many threads as torch
        uses, one batch ahead of the caller.

        Raises ``UserError`` that names unscorable images (damaged, transparent, more than 8 bits) and counts them;
        with ``skip_bad`` they are replaced by the next ones, and it is an error only if too few are left.
        """
        done = self.done = resumed or Pass()
        names = self.names if self.skip_bad else self.names[: self.count]
        parts = [names[low : low + size] for low in range(done.taken, len(names), size)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            work = partial(self._load_image, transform)
            pending = pool.map(work, parts[0] if parts else [])
            for part, next_part in zip(parts, [*parts[1:], []], strict=True):
                if self._complete:
                    break
                loaded = list(pending)
                pending = pool.map(work, next_part)
                batch = []
                for name, image in zip(part, loaded, strict=True):
                    if self._complete:
                        break
                    done.add(name, image)
                    if isinstance(image, LoadedImage):
                        batch.append(image.result)
                self._check_skipped()
                yield batch
        self._check_count(self.scored_count)

    @property
    def scored_count(self) -> int:
        """The number of images that the last pass returned."""
        return len(self.done.digests)

    @property
    def sha256(self) -> str:
        """The hash of the pixels that the last pass returned, in their order: equal for equal images in any format."""
        return hashlib.sha256(b"".join(self.done.digests)).hexdigest()

    def remarks(self) -> list[str]:
        """What the last pass did not use, for readers."""
        found = [describe_left_out(self.left_out)]
        if unused := len(self.names) - self.done.taken:
            found.append(f"{unused:,} of {len(self.names):,} images not needed")
        if self.done.skipped:
            name, reason = next(iter(self.done.skipped.items()))
            found.append(f"{len(self.done.skipped):,} images skipped, for example {name}: {reason}")
        if self.done.further_frames:
            frames = sum(self.done.further_frames.values())
            found.append(f"{frames:,} further frames of {len(self.done.further_frames):,} images not used")
        return [f"{self.source}: {remark}." for remark in found if remark]

    @property
    def _complete(self) -> bool:
        return self.count is not None and self.scored_count >= self.count

    def _check_count(self, found: int) -> None:
        if self.count is not None and found < self.count:
            remark = describe_left_out(self.left_out)
            raise UserError(
                f"{self.source} contains {found:,} scorable images, {self.count:,} are required; add the missing "
                f"ones, or set n to {found}.{f' {remark}.' if remark else ''}"
            )

    def _check_skipped(self) -> None:
        if self.done.skipped and not self.skip_bad:
            name, reason = next(iter(self.done.skipped.items()))
            count = f" ({len(self.done.skipped)} such images so far)" if len(self.done.skipped) > 1 else ""
            raise UserError(
                f"{self.source}: {name} cannot be scored: {reason}{count}. --skip-bad leaves such images out."
            )

    def _load_image(self, transform: Callable[[Tensor], T], name: str) -> LoadedImage | UnscorableImage:
        further = 0
        try:
            if self.frames:
                image = read_video(self.source / name, self.frames).transpose(0, 1)
            else:
                pixels, further = _decode(self.load(name), self.crop)
                image = torch.from_numpy(pixels).permute(2, 0, 1)
        except (UserError, UnscorableImage) as error:
            return UnscorableImage(str(error))
        except Exception as error:  # a file of others: damaged archives and decoders raise exceptions of all types
            return UnscorableImage(f"it cannot be read ({_reason(error)})")
        try:
            return LoadedImage(transform(image), pixels_sha256(image), further)
        except UserError as error:  # a network cannot take an image of this size
            return UnscorableImage(str(error).removesuffix("."))


def pixels_sha256(image: Tensor) -> bytes:
    """The hash of an image's or video's shape and pixels, uint8."""
    return hashlib.sha256(str(list(image.shape)).encode() + image.contiguous().numpy().tobytes()).digest()


def _decode(content: bytes | np.ndarray, crop: Crop | None) -> tuple[np.ndarray, int]:
    """uint8 [H, W, 3], grey repeated, and the number of frames after the first. Raises ``UnscorableImage``."""
    further = 0
    if isinstance(content, bytes):
        if content.startswith(b"\x89PNG") and content[24:25] == b"\x10":  # Pillow reduces 16-bit RGB without a word
            raise UnscorableImage("its pixels have 16 bits, not 8 bits per channel")
        try:
            image: Image.Image = Image.open(io.BytesIO(content))
            further = getattr(image, "n_frames", 1) - 1  # an attribute of formats that can have several
            image.load()
        except Exception as error:  # on damage Pillow raises exceptions of almost every type
            raise UnscorableImage(f"it is damaged or not an image ({_reason(error)})") from error
    else:
        image = Image.fromarray(content)
    if image.mode not in EIGHT_BITS:
        raise UnscorableImage(f"its pixels are {image.mode}, not 8 bits per channel")
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if transparent and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise UnscorableImage(TRANSPARENT)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(crop(rgb) if crop else rgb), further


def _reason(error: Exception) -> str:
    """An error's message; Pillow's for an unknown format shows the address of a buffer."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is unknown"
    return str(error) or type(error).__name__


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
