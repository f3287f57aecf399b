"""The figure of a shootout: quality against training evaluations, and against evaluations in sampling."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fewstep.eval.report.charts import COLOURS
from fewstep.eval.score_files import Score

Curve = Sequence[tuple[float, float]]


def draw_frontier(scores: Sequence[Score], curves: Mapping[str, Sequence[Curve]], file: Path) -> None:
    """Writes a PNG. Left: validation of each method over its training evaluations, a thin line a seed and a thick one
    for their mean. Right: the first metric of ``scores`` against NFE, students as points with the deviation over seeds,
    teachers' solvers as lines, each at the guidance that is best there."""
    metric = scores[0].metric
    figure = Figure((10, 4.6), layout="constrained")
    training, sampling = figure.subplots(1, 2)
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(curves)}
    looks: dict[str, Literal["-", "--"]] = {m: "-" if i < len(COLOURS) else "--" for i, m in enumerate(curves)}
    fills: dict[str, Literal["full", "none"]] = {m: "full" if look == "-" else "none" for m, look in looks.items()}
    for method, seeds in curves.items():
        if not all(seeds):  # runs without validation have no curve
            continue
        for points in seeds:
            training.plot(*zip(*points, strict=True), looks[method], color=colours[method], linewidth=0.6, alpha=0.5)
        mean = [
            (statistics.fmean(x for x, _ in column), statistics.fmean(y for _, y in column))
            for column in zip(*seeds, strict=True)
        ]
        training.plot(*zip(*mean, strict=True), looks[method], color=colours[method], linewidth=1.6)
    training.set(xlabel="network evaluations in training (samples)", ylabel=f"{metric}, validation")
    own = [score for score in scores if score.metric == metric]
    teachers = [score for score in own if score.role == "teacher"]
    for solver, look in zip(dict.fromkeys(score.solver for score in teachers), cycle("os^vDP"), strict=False):
        best: dict[int, float] = {}
        for score in teachers:
            if score.solver == solver:
                best[score.nfe] = min(score.value, best.get(score.nfe, float("inf")))
        line = sorted(best.items())
        sampling.plot(
            *zip(*line, strict=True), f"{look}-", color="#999999", markersize=3, linewidth=1, label=f"teacher, {solver}"
        )
    for method in curves:
        for nfe in sorted({score.nfe for score in own if score.model == method}):
            values = [score.value for score in own if score.model == method and score.nfe == nfe]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            sampling.errorbar(
                nfe, statistics.fmean(values), spread, fmt="D", markersize=5, color=colours[method], capsize=2,
                fillstyle=fills[method],
            )  # fmt: skip
    sampling.set(xlabel="network evaluations a sample", ylabel=metric, xscale="log")
    for axes in (training, sampling):
        axes.set_yscale("log")
        for axis in (axes.yaxis, *([axes.xaxis] if axes is sampling else [])):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15)
    training.xaxis.set_major_formatter(EngFormatter())
    if teachers:
        sampling.legend(frameon=False, fontsize=8)
    methods = [
        Line2D([], [], linestyle=looks[m], color=colours[m], marker="D", fillstyle=fills[m], label=m) for m in curves
    ]
    figure.legend(handles=methods, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
