"""Line charts for the report, as inline SVG that follows the page's colour scheme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

MAXIMUM_POINTS = 60  # per line; more are averaged over intervals
INK = "#123456"  # replaced by currentColor, so that a chart follows the page's light or dark scheme
COLOURS = ("#d9731a", "#3a86c8", "#2a9d76", "#b3679b", "#8a8f98", "#c0a030", "#6b5bb5", "#a23b3b")
CHART_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "legend.frameon": False, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.grid": True, "grid.color": INK,
    "grid.alpha": 0.12, "grid.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip


class Line(NamedTuple):
    """A line of a chart; ``style`` is matplotlib's format (``"-"``, ``"o-"``, ``"D"``). One with ``emphasis`` is drawn
    over the others, in the first colour."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "-"
    emphasis: bool = False


class Chart(NamedTuple):
    """A chart for a page."""

    caption: str
    svg: Markup


def chart(
    caption: str, axis: str, lines: Sequence[Line], marks: Sequence[float] = (), *, y_axis: str, log_x: bool = False
) -> Chart:  # fmt: skip
    """Lines of ``y_axis`` over ``axis`` as an inline SVG in the page's colours, with dotted vertical ``marks``.

    A line of more than ``MAXIMUM_POINTS`` points becomes the mean and the range over intervals of equal length. y is
    logarithmic if it is positive and spans a factor of 8. Equal arguments give equal text.
    """
    import matplotlib  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lines = [line for line in lines if line.points]
    style: Any = CHART_STYLE | {"svg.hashsalt": caption + axis}  # so that ids are unique within a page
    with matplotlib.rc_context(style):
        figure = Figure((4.2, 2.6), layout="constrained")
        axes = figure.add_subplot(xlabel=axis, ylabel=y_axis)
        others = cycle(COLOURS[1:] if any(line.emphasis for line in lines) else COLOURS)
        for line in lines:
            colour = COLOURS[0] if line.emphasis else next(others)
            length = math.ceil(len(line.points) / MAXIMUM_POINTS)
            intervals = [np.array(line.points[i : i + length]) for i in range(0, len(line.points), length)]
            x, y = np.array([part.mean(0) for part in intervals]).T
            low, high = [part[:, 1].min() for part in intervals], [part[:, 1].max() for part in intervals]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, y, line.style, color=colour, label=line.name, linewidth=1.4,
                      markersize=6 if line.emphasis else 3.5, zorder=3 if line.emphasis else 2)  # fmt: skip
        for mark in marks:
            axes.axvline(mark, color=INK, alpha=0.8, linewidth=1, linestyle=":")
        if log_x:
            ticks = _spaced(sorted({x for line in lines for x, _ in line.points}))
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
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    ends = "; ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return Chart(caption, _inline(file.getvalue(), f"{caption} against {axis}: {ends}"))


def _spaced(values: Sequence[float]) -> list[float]:
    """Those of ascending values whose labels do not overlap on a logarithmic axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.4 * kept[-1]:
            kept.append(value)
    return kept


def _inline(svg: str, alt: str) -> Markup:
    """Matplotlib's SVG file as part of a page: without addresses, size, font, text colour and names of groups."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index("</defs>") + len("</defs>") :].replace(INK, "currentColor")
    body = re.sub(r"font-family: [^;]*; ", "", re.sub(r'<g id="[^"]*"', "<g", body))
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(alt)}">{body}')
