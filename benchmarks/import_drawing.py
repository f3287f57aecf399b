"""Draws which package imports which, as docs/imports.svg: ``python benchmarks/import_drawing.py``.

Packages are ordered as the contract in pyproject.toml orders them; an arrow that points upward would be drawn in red.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import grimp
import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"distill": -1.0, "eval": 1.0}  # beside each other, others in the middle


def layers() -> list[list[str]]:
    """The layers of the contract, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def imports() -> Counter[tuple[str, str]]:
    """The number of imports between modules of two packages."""
    graph = grimp.build_graph("fewstep")
    pairs: Counter[tuple[str, str]] = Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            packages = [name.split(".")[1] for name in (importer, imported) if name.count(".")]
            if len(packages) == 2 and packages[0] != packages[1]:
                pairs[packages[0], packages[1]] += 1
    return pairs


def draw(file: Path) -> None:
    height = {name: -float(depth) for depth, layer in enumerate(layers()) for name in layer}
    place = {name: (PLACES.get(name, 0.0), level) for name, level in height.items()}
    with matplotlib.rc_context({"svg.hashsalt": "imports", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure((6, 5.2), layout="constrained")
        axes = figure.add_subplot(xlim=(-2, 2), ylim=(min(height.values()) - 0.4, 0.4))
        axes.set_axis_off()
        for (importer, imported), count in sorted(imports().items()):
            if importer not in height or imported not in height:
                continue
            colour = "#3a86c8" if height[importer] > height[imported] else "red"
            bend = 0.0 if height[importer] - height[imported] == 1 else 0.35
            style = {"arrowstyle": "-|>", "color": colour, "alpha": 0.6, "linewidth": 0.5 + count**0.5 / 4}
            style |= {"shrinkA": 18, "shrinkB": 18, "connectionstyle": f"arc3,rad={bend}"}
            axes.annotate("", place[imported], place[importer], arrowprops=style)
        for name, (x, y) in place.items():
            axes.text(x, y, name, ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": "#3a86c8"})
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "imports.svg")
