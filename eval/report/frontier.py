"""The figure of a comparison of objectives: quality against evaluations in training and in sampling."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fewstep.core.files import atomic_write
from fewstep.eval.report.charts import COLOURS
from fewstep.eval.report.ranking import best_of, direction_of
from fewstep.eval.score_files import Score

Curve = Sequence[tuple[float, float]]


class _Style(NamedTuple):
    """The style of a method, the same in both panels."""

    colour: str
    line: Literal["-", "--"]
    fill: Literal["full", "none"]


def draw_frontier(scores: Sequence[Score], curves: Mapping[str, Sequence[Curve]], file: Path) -> None:
    """Writes a PNG.

    Left: validation of each method against its training evaluations, a thin line per seed and a thick one for their
    mean. Right: the first metric of ``scores`` against NFE, students as points with the deviation over seeds, the
    teachers' solvers as lines, with the best guidance for each NFE.
    """
    metric = scores[0].metric
    scores = [score for score in scores if score.metric == metric]
    figure = Figure((10, 4.6), layout="constrained")
    training, sampling = figure.subplots(1, 2)
    styles = {
        method: _Style(COLOURS[i % len(COLOURS)], *(("-", "full") if i < len(COLOURS) else ("--", "none")))
        for i, method in enumerate(curves)
    }
    for method, seeds in curves.items():
        if all(seeds):  # runs without validation have no curve
            _draw_training(training, seeds, styles[method])
    training.set(xlabel="network evaluations in training (samples)", ylabel=f"{metric}, validation")
    _draw_teachers(sampling, [score for score in scores if score.role == "teacher"])
    for method, style in styles.items():
        _draw_students(sampling, [score for score in scores if score.model == method], style)
    sampling.set(xlabel="network evaluations per sample", ylabel=metric, xscale="log")
    for axes in (training, sampling):
        axes.set_yscale("log")
        for axis in (axes.yaxis, *([axes.xaxis] if axes is sampling else [])):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15)
    training.xaxis.set_major_formatter(EngFormatter())
    methods = [
        Line2D([], [], linestyle=s.line, color=s.colour, marker="D", fillstyle=s.fill, label=method)
        for method, s in styles.items()
    ]
    figure.legend(handles=methods, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _draw_training(axes: Axes, seeds: Sequence[Curve], style: _Style) -> None:
    for points in seeds:
        axes.plot(*zip(*points, strict=True), style.line, color=style.colour, linewidth=0.6, alpha=0.5)
    mean = [tuple(map(statistics.fmean, zip(*column, strict=True))) for column in zip(*seeds, strict=True)]
    axes.plot(*zip(*mean, strict=True), style.line, color=style.colour, linewidth=1.6)


def _draw_teachers(axes: Axes, scores: Sequence[Score]) -> None:
    for sampler, marker in zip(dict.fromkeys(score.sampler for score in scores), cycle("os^vDP"), strict=False):
        by_nfe: dict[int, list[Score]] = {}
        for score in scores:
            if score.sampler == sampler:
                by_nfe.setdefault(score.nfe, []).append(score)
        direction = direction_of(scores[0])  # unknown: every guidance is shown
        shown = [[best_of(by_nfe[nfe], direction)] if direction else by_nfe[nfe] for nfe in sorted(by_nfe)]
        points = [(score.nfe, score.value) for group in shown for score in group]
        axes.plot(
            *zip(*points, strict=True), f"{marker}-", color="#999999", markersize=3, linewidth=1,
            label=f"teacher, {sampler}",
        )  # fmt: skip
    if scores:
        axes.legend(frameon=False, fontsize=8)


def _draw_students(axes: Axes, scores: Sequence[Score], style: _Style) -> None:
    for nfe in sorted({score.nfe for score in scores}):
        values = [score.value for score in scores if score.nfe == nfe]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(
            nfe, statistics.fmean(values), spread, fmt="D", markersize=5, color=style.colour, capsize=2,
            fillstyle=style.fill, zorder=3,
        )  # fmt: skip
