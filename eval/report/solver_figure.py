"""The table and the figure of a comparison of solvers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fewstep.core.files import write_text
from fewstep.eval.report.charts import COLOURS
from fewstep.eval.solver_comparison import Line, at_their_best, cells


def write_comparison(lines: Sequence[Line], folder: Path) -> None:
    """``sweep.md`` and ``sweep.png`` with every solver at its best."""
    best = at_their_best(lines)
    head, *body = cells(best)
    write_text("".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body)), folder / "sweep.md")
    draw_comparison(best, folder / "sweep.png")


def draw_comparison(lines: Sequence[Line], file: Path) -> None:
    """Writes a PNG: the error against NFE and, if there are scores, the score against NFE."""
    scored = [line for line in lines if line.value is not None]
    figure = Figure((11 if scored else 7, 4), layout="constrained")
    panels = [("error to the long run", lambda line: line.error, lines)]
    if scored:
        panels.append((str(scored[0].metric), lambda line: line.value, scored))
    for axes, (label, of, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, solver in enumerate(dict.fromkeys(line.solver for line in shown)):
            points = sorted((line.nfe, of(line)) for line in shown if line.solver == solver)
            look = ("o-", "s--", "^:")[i // len(COLOURS) % 3]
            axes.plot(*zip(*points, strict=True), look, color=COLOURS[i % len(COLOURS)], markersize=3, label=solver)
        axes.set(xlabel="network evaluations a sample", ylabel=label, xscale="log", yscale="log")
        ticks = sorted({line.nfe for line in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
