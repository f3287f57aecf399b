"""Draws ``results/health/health.png`` from the logs of three runs beside it: ``python benchmarks/health_figure.py``."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent.parent / "results" / "health"
RUNS = {"lagging": "#d9731a", "strong": "#b3679b", "demo": "#3a86c8"}
CURVES = {
    "validation": "fd_fashion, 500 samples",
    "health/sample_sd": "std of the training samples",
    "health/sd_ratio": "std, times the teacher's",
    "health/ca_share": "share of guidance in the direction",
}


def main() -> None:
    figure = Figure((11, 2.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for name, colour in RUNS.items():
            lines = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*(zip(*points, strict=True) if points else ([], [])), color=colour, label=name, linewidth=1.4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "health.png", dpi=110)


if __name__ == "__main__":
    main()
