"""The table and the figure of a comparison of solvers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fewstep.core.files import atomic_write, write_text
from fewstep.eval.report.charts import COLOURS
from fewstep.eval.solver_comparison import SolverResult, best_grids, table_rows


def write_solver_comparison(results: Sequence[SolverResult], folder: Path) -> None:
    """Writes ``solvers.md`` and ``solvers.png`` with every solver on its best grid."""
    best = best_grids(results)
    head, *body = table_rows(best)
    write_text("".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body)), folder / "solvers.md")
    draw_solver_comparison(best, folder / "solvers.png")


def draw_solver_comparison(results: Sequence[SolverResult], file: Path) -> None:
    """Writes a PNG: the error against NFE and, if there are scores, the score against NFE."""
    scored = [result for result in results if result.value is not None]
    figure = Figure((11 if scored else 7, 4), layout="constrained")
    panels = [("error to the long run", lambda result: result.error, results)]
    if scored:
        panels.append((str(scored[0].metric), lambda result: result.value, scored))
    for axes, (label, value_of, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, solver in enumerate(dict.fromkeys(result.solver for result in shown)):
            points = sorted((result.nfe, value_of(result)) for result in shown if result.solver == solver)
            style = ("o-", "s--", "^:")[i // len(COLOURS) % 3]
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[i % len(COLOURS)], markersize=3, label=solver)
        axes.set(xlabel="network evaluations per sample", ylabel=label, xscale="log", yscale="log")
        ticks = sorted({result.nfe for result in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
