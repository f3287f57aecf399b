"""Images laid out for people: grids, and rows that several models generated from the same noise; written to files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_write
from fewstep.core.image_files import require_av

WHITE = 255
SMALL, VISIBLE = 64, 48  # pixels of a side
GREY = (124, 124, 124)  # of labels: readable on white and on black pages
FPS = 16  # of videos
LABEL_SIZE, LABEL_HEIGHT, MARGIN = 14, 20, 6  # of comparison, in pixels
CAPTION_SIZE, CAPTION_HEIGHT, CAPTION_LINES = 11, 14, 4


def image_grid(images: Tensor, columns: int, scale: int | None = None, gap: int = 1) -> Image.Image:
    """Lays images out row by row on white, each pixel enlarged to ``scale`` x ``scale``, ``gap`` pixels between them.
    By default images of up to ``SMALL`` pixels are enlarged: twice, or until they have ``VISIBLE`` pixels.

    Args:
        images: uint8 ``[N, C, H, W]`` in 0..255, one channel (grey) or three (RGB), N at least 1.
        columns: images per row; fewer images than that make a narrower grid.

    Raises ``ValueError`` on another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"image_grid needs uint8 [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
    if scale is None:
        side = min(images.shape[2:])
        scale = max(2, math.ceil(VISIBLE / side)) if side <= SMALL else 1
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(f"image_grid needs columns and scale from 1, gap from 0, got {columns}, {scale}, {gap}")
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


def comparison(
    rows: Sequence[tuple[str, Tensor]], scale: int | None = None, gap: int = 1, captions: Sequence[str] = ()
) -> Image.Image:
    """One row of images per model with its label above: column k of every row should come from the same noise.

    The background is transparent, so that the image suits light and dark pages.

    Args:
        rows: at least one (label, images); the images as for ``image_grid``.
        captions: written above the columns, in at most four lines each.

    Raises ``ValueError`` as ``image_grid`` does, and without rows.
    """
    if not rows:
        raise ValueError("comparison needs at least one row")
    font = ImageFont.load_default(LABEL_SIZE)
    strips = [(label, image_grid(images, len(images), scale, gap)) for label, images in rows]
    column = (strips[0][1].width + gap) // len(rows[0][1])
    small = ImageFont.load_default(CAPTION_SIZE)
    titles = [_lines(caption, column - MARGIN, small) for caption in captions]
    top = CAPTION_HEIGHT * max(map(len, titles), default=0) + (MARGIN if titles else 0)
    width = max(max(strip.width, math.ceil(font.getlength(label))) for label, strip in strips)
    height = top + sum(LABEL_HEIGHT + strip.height + MARGIN for _, strip in strips) - MARGIN
    canvas = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    for k, lines in enumerate(titles):
        for line, text in enumerate(lines):
            draw.text((k * column, line * CAPTION_HEIGHT), text, GREY, small)
    for label, strip in strips:
        draw.text((0, top), label, GREY, font)
        canvas.paste(strip, (0, top + LABEL_HEIGHT))
        top += LABEL_HEIGHT + strip.height + MARGIN
    return canvas


def _lines(text: str, width: int, font: Any) -> list[str]:
    """A text broken between words into at most ``CAPTION_LINES`` lines of ``width`` pixels; dots for what is left."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        elif len(lines) < CAPTION_LINES:
            lines.append(word)
        else:
            return [*lines[:-1], f"{lines[-1]} …"]
    return lines


def save_sample(sample: Tensor, file: Path, fps: int = FPS) -> None:
    """Writes an image, uint8 [C, H, W], as PNG, or a video, uint8 [F, C, H, W], as MP4 (H.264; needs PyAV) or as an
    endless GIF, by the file's suffix. Raises ``UserError`` if the file cannot be written."""
    if sample.ndim == 3:
        save_grid(sample[None], file, columns=1, scale=1, gap=0)
        return
    frames = [image_grid(frame[None], columns=1, scale=1, gap=0) for frame in sample]
    if file.suffix == ".gif":
        _save_gif(frames, file, fps)
        return
    require_av()
    with atomic_write(file) as temporary:
        _write_mp4(frames, temporary, fps)


def _save_gif(frames: Sequence[Image.Image], file: Path, fps: int) -> None:
    save_image(frames[0], file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)


def _write_mp4(frames: Sequence[Image.Image], file: Path, fps: int) -> None:
    import av

    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())


def save_image(image: Image.Image, file: str | Path, kind: str = "PNG", **settings: Any) -> None:
    """Writes an image file atomically, creating its folder; ``kind`` and ``settings`` are Pillow's. Raises
    ``UserError`` if the file cannot be written."""
    file = Path(file)
    with atomic_write(file) as temporary:
        image.save(temporary, format=kind, **settings)


def save_grid(images: Tensor, file: str | Path, columns: int, scale: int | None = None, gap: int = 1) -> None:
    """``image_grid`` as a PNG file; of videos, uint8 [N, F, C, H, W], as an endless GIF. Raises ``UserError`` if the
    file cannot be written or has the name of another type, and for videos if it does not end in ``.gif``."""
    if images.ndim != 5:
        if Path(file).suffix.lower() not in ("", ".png"):
            raise UserError(f"{file}: a grid of images is a PNG; name a .png file.")
        save_image(image_grid(images, columns, scale, gap), file)
        return
    if Path(file).suffix.lower() != ".gif":
        raise UserError(f"{file}: a grid of videos is a GIF; name a .gif file.")
    _save_gif([image_grid(frame, columns, scale, gap) for frame in images.unbind(1)], Path(file), FPS)
