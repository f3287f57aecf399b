"""Pictures: grids of images, rows of images that several models made from the same noise, charts for the report."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.models.store import replacing
from fewstep.pictures import require_av

WHITE = 255
GREY = (124, 124, 124)  # of labels: as readable on a white page as on a black one
LABEL_SIZE, LABEL_HEIGHT, MARGIN = 14, 20, 6  # of comparison, in pixels

MOST_POINTS = 60  # of a chart's line; more become stretches
INK = "#123456"  # no line's colour: becomes currentColor, so that a chart follows the page's light or dark scheme
COLOURS = ("#d9731a", "#3a86c8", "#2a9d76", "#b3679b", "#8a8f98", "#c0a030", "#6b5bb5", "#a23b3b")
CHART_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "legend.frameon": False, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.grid": True, "grid.color": INK,
    "grid.alpha": 0.12, "grid.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip


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
    with replacing(file) as aside:
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
    with replacing(file) as aside:
        picture.save(aside, format=kind, **settings)


def save_grid(images: Tensor, file: str | Path, columns: int, scale: int = 2, gap: int = 1) -> None:
    """``grid`` as a PNG file. Raises ``UserError`` when the place cannot be written."""
    save_picture(grid(images, columns, scale, gap), file)


class Line(NamedTuple):
    """A line of a chart; ``look`` is matplotlib's format (``"-"``, ``"o-"``, ``"D"``)."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str = "-"


class Chart(NamedTuple):
    """A chart to be put into a page."""

    caption: str
    svg: Markup


def chart(caption: str, axis: str, lines: Sequence[Line], marks: Sequence[float] = (), log_x: bool = False) -> Chart:
    """Lines over ``axis`` as an inline SVG in the colours of the page, with dotted lines at ``marks``.

    A line of more than ``MOST_POINTS`` points becomes the mean and the range of stretches of equal length. y is
    logarithmic when it is positive and spans a factor of 8. The same arguments always give the same text.
    """
    import matplotlib  # here, for it takes a while and saving a grid does without
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lines = [line for line in lines if line.points]
    style: Any = CHART_STYLE | {"svg.hashsalt": caption + axis}  # salted apart, so that no id is twice in a page
    with matplotlib.rc_context(style):
        figure = Figure((4.2, 2.6), layout="constrained")
        axes = figure.add_subplot(xlabel=axis)
        for line, colour in zip(lines, cycle(COLOURS), strict=False):
            length = math.ceil(len(line.points) / MOST_POINTS)
            stretches = [np.array(line.points[i : i + length]) for i in range(0, len(line.points), length)]
            x, y = np.array([part.mean(0) for part in stretches]).T
            low, high = [part[:, 1].min() for part in stretches], [part[:, 1].max() for part in stretches]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, y, line.look, color=colour, label=line.name, linewidth=1.4, markersize=4)
        for mark in marks:
            axes.axvline(mark, color=INK, alpha=0.8, linewidth=1, linestyle=":")
        if log_x:
            ticks = _apart(sorted({x for line in lines for x, _ in line.points}))
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        values = [y for line in lines for _, y in line.points]
        if values and max(values) > 8 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 500 * min(values) else (1,)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        if len(lines) > 1:
            axes.legend()
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    ends = "; ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return Chart(caption, _inline(file.getvalue(), f"{caption} against {axis}: {ends}"))


def _apart(values: Sequence[float]) -> list[float]:
    """Those of ascending values whose numbers will not touch on a logarithmic axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.4 * kept[-1]:
            kept.append(value)
    return kept


def _inline(svg: str, alt: str) -> Markup:
    """Matplotlib's SVG file as a part of a page: without address, size, font, ink and group names of its own."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index("</defs>") + len("</defs>") :].replace(INK, "currentColor")
    body = re.sub(r"font-family: [^;]*; ", "", re.sub(r'<g id="[^"]*"', "<g", body))
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(alt)}">{body}')
