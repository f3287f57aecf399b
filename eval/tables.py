"""Markdown tables in the documentation, made from committed result files.

A block ``<!-- scores: FILE ... -->`` … ``<!-- end -->`` holds the table of those files' scores. ``python -m
fewstep.eval.tables README.md`` writes the blocks anew; a test checks that they agree with the files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fewstep.eval.evaluate import Score

BLOCK = re.compile(r"(<!-- scores: (?P<files>[^>]*?) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)


def read_scores(file: Path) -> list[Score]:
    return [Score.model_validate(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def markdown(scores: Sequence[Score]) -> str:
    """One row a (model, solver, steps, guidance): the value, or mean ± standard deviation over several seeds."""
    names = list(dict.fromkeys(score.metric for score in scores))
    head = ["model", "solver", "guidance", "NFE", *names, "n", "seeds", "seconds"]
    rows = [head, ["---"] * len(head)]
    for key in dict.fromkeys((s.model, s.solver, s.steps, s.guidance, s.nfe, s.n) for s in scores):
        own = [s for s in scores if (s.model, s.solver, s.steps, s.guidance, s.nfe, s.n) == key]
        model, solver, _, guidance, nfe, n = key
        seeds = sorted({s.seed for s in own})
        seconds = sum({s.seed: s.seconds for s in own}.values()) / len(seeds)
        cells = [_cell([s.value for s in own if s.metric == name]) for name in names]
        rows.append(
            [model, solver, f"{guidance:g}", str(nfe), *cells, str(n), " ".join(map(str, seeds)), f"{seconds:.0f}"]
        )
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _cell(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.3f} ± {spread:.3f}"


def refreshed(text: str, root: Path) -> str:
    """The text with every block's table made anew from the files it names (relative to ``root``)."""

    def block(match: re.Match[str]) -> str:
        scores = [score for file in match["files"].split() for score in read_scores(root / file)]
        return f"{match[1]}{markdown(scores)}{match[4]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(refreshed(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
