"""Images laid out for people: grids, and rows that several models generated from the same noise; written to files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.core.files import atomic_write
from fewstep.core.image_files import require_av

WHITE = 255
GREY = (124, 124, 124)  # of labels: readable on white and on black pages alike
LABEL_SIZE, LABEL_HEIGHT, MARGIN = 14, 20, 6  # of comparison, in pixels


def grid(images: Tensor, columns: int, scale: int = 2, gap: int = 1) -> Image.Image:
    """Lays images out row by row on white, each pixel enlarged to ``scale`` x ``scale``, ``gap`` pixels between them.

    Args:
        images: uint8 ``[N, C, H, W]`` in 0..255, one channel (grey) or three (RGB), N at least 1.
        columns: images a row; fewer images than that make a narrower grid.

    Raises ``ValueError`` on another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"grid needs uint8 [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(f"grid needs columns and scale from 1, gap from 0, got {columns}, {scale}, {gap}")
    large = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, channels, height, width = large.shape
    columns = min(columns, count)
    size = (math.ceil(count / columns) * (height + gap) - gap, columns * (width + gap) - gap)
    canvas = torch.full((channels, *size), WHITE, dtype=torch.uint8)
    for index, image in enumerate(large):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    pixels = canvas.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def comparison(rows: Sequence[tuple[str, Tensor]], scale: int = 2, gap: int = 1) -> Image.Image:
    """One row of images a model, its label above it: column k of every row is meant to come from the same noise.

    The ground is transparent, so that the picture suits light and dark pages.

    Args:
        rows: at least one (label, images); the images as for ``grid``.

    Raises ``ValueError`` as ``grid`` does, and when there are no rows.
    """
    if not rows:
        raise ValueError("comparison needs at least one row")
    font = ImageFont.load_default(LABEL_SIZE)
    strips = [(label, grid(images, len(images), scale, gap)) for label, images in rows]
    width = max(max(strip.width, math.ceil(font.getlength(label))) for label, strip in strips)
    height = sum(LABEL_HEIGHT + strip.height + MARGIN for _, strip in strips) - MARGIN
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw, top = ImageDraw.Draw(picture), 0
    for label, strip in strips:
        draw.text((0, top), label, GREY, font)
        picture.paste(strip, (0, top + LABEL_HEIGHT))
        top += LABEL_HEIGHT + strip.height + MARGIN
    return picture


def save_sample(sample: Tensor, file: Path, fps: int = 16) -> None:
    """A picture, uint8 [C, H, W], as PNG, or a video, uint8 [F, C, H, W], as MP4 (H.264; needs PyAV) or as GIF that
    repeats for ever, by the file's suffix. Raises ``UserError`` when the place cannot be written."""
    if sample.ndim == 3:
        save_grid(sample[None], file, columns=1, scale=1, gap=0)
        return
    frames = [grid(frame[None], columns=1, scale=1, gap=0) for frame in sample]
    if file.suffix == ".gif":
        save_picture(frames[0], file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)
        return
    require_av()
    with atomic_write(file) as aside:
        _write_mp4(frames, aside, fps)


def _write_mp4(frames: Sequence[Image.Image], file: Path, fps: int) -> None:
    import av

    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())


def save_picture(picture: Image.Image, file: str | Path, kind: str = "PNG", **settings: Any) -> None:
    """Writes a file aside, then renames it; makes the folder. ``kind`` and ``settings`` are Pillow's. Raises
    ``UserError`` when the place cannot be written."""
    file = Path(file)
    with atomic_write(file) as aside:
        picture.save(aside, format=kind, **settings)


def save_grid(images: Tensor, file: str | Path, columns: int, scale: int = 2, gap: int = 1) -> None:
    """``grid`` as a PNG file. Raises ``UserError`` when the place cannot be written."""
    save_picture(grid(images, columns, scale, gap), file)
