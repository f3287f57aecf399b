"""The report's table of scores, and a summary of the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from fewstep.eval.report.ranking import best_of
from fewstep.eval.report.run_files import Result

ARROWS = {"lower": "↓", "higher": "↑", None: ""}


class Cell(NamedTuple):
    """A cell; ``best`` marks the best value of its column for its number of samples, ``notes`` stand beside it."""

    text: str
    best: bool = False
    notes: tuple[str, ...] = ()


def number(value: float) -> str:
    """Four significant digits; thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def columns(results: Sequence[Result]) -> dict[str, str]:
    """The columns of metrics, each with an arrow for its direction."""
    return {result.column: ARROWS[result.direction] for result in results}


def origins(results: Sequence[Result]) -> dict[str, str]:
    """The reference and features of each column."""
    return {result.column: result.origin for result in results}


def explanations(results: Sequence[Result]) -> list[str]:
    """What the notes beside the numbers mean."""
    errors = {result.column: result.error_of for result in results if result.error is not None and result.error_of}
    found = [f"Error of {column}: {what}." for column, what in errors.items()]
    if any(result.bias is not None for result in results):
        found.append(
            "Real samples ≈: the score of equally many random real samples, not 0 because they are so few; smaller "
            "differences mean little."
        )
    return found


def table(results: Sequence[Result]) -> list[tuple[str, list[list[Cell]]]]:
    """Groups of rows by role, model and solver, each with its title."""
    metrics = columns(results)
    best: dict[tuple[str, int], float] = {}
    for result in results:
        if result.direction and (key := (result.column, result.n)) not in best:
            rivals = [other for other in results if (other.column, other.n) == key]
            best[key] = best_of(rivals, result.direction).value

    def row(group: Sequence[Result]) -> list[Cell]:
        first, by_column = group[0], {result.column: result for result in group}
        cells = [Cell(str(first.nfe)), Cell(str(first.steps)), Cell(f"{first.guidance:g}")]
        for column in metrics:
            if (result := by_column.get(column)) is None:
                cells.append(Cell("–"))
                continue
            text = number(result.value)
            decimals = len(text.partition(".")[2])
            spread = "" if result.spread is None else f" ± {result.spread:.{decimals}f}"
            notes: tuple[str, ...] = () if result.error is None else (f"error ± {result.error:.{decimals}f}",)
            notes += () if result.bias is None else (f"real samples ≈ {number(result.bias)}",)
            cells.append(Cell(text + spread, result.value == best.get((column, result.n)), notes))
        seeds, seconds = ", ".join(map(str, first.seeds)), max(result.seconds for result in group)
        return [*cells, Cell(f"{first.n:,}"), Cell(seeds), Cell(f"{seconds:.1f}")]

    rows = [(key[:3], row(list(group))) for key, group in groupby(results, key=lambda result: result.setting)]
    return [
        (f"{role} {model} · {solver}", [cells for _, cells in group])
        for (role, model, solver), group in groupby(rows, key=lambda item: item[0])
    ]


def verdict(results: Sequence[Result]) -> list[str]:
    """The student's best score beside the teacher's at the same and at any NFE, by the first metric with a direction;
    metrics for which lower is better come first."""
    known = [(result.column, result.direction) for result in results if result.direction is not None]
    if not known:
        return []
    metric, direction = min(known, key=lambda item: item[1] != "lower")
    students = [result for result in results if result.column == metric and result.role == "student"]
    teachers = [result for result in results if result.column == metric and result.role == "teacher"]
    if not students:
        return [f"The teacher's best {metric} is {_describe(best_of(teachers, direction))}."] if teachers else []
    student = best_of(students, direction)
    sentences = [f"The student's best {metric} is {_describe(student)}."]
    comparable = [result for result in teachers if result.n == student.n]
    same_nfe = [result for result in comparable if result.nfe == student.nfe]
    for label, group in (("at the same NFE", same_nfe), ("at any NFE", comparable)):
        if group:
            top = best_of(group, direction)
            ratio = f"; the student's is {student.value / top.value:.2f} times that" if top.value > 0 else ""
            sentences.append(f"The teacher's best {label} is {_describe(top)}{ratio}.")
    if comparable:
        as_good = [result.nfe for result in comparable if best_of([result, student], direction) is result]
        needs = f"needs {min(as_good)} NFE to match it" if as_good else "matches it at none of the measured NFE"
        sentences.append(f"The teacher {needs}.")
    elif teachers:
        sentences.append("The teacher was scored on a different number of samples, so the two are not compared.")
    return sentences


def _describe(result: Result) -> str:
    sampling = f"{result.sampler}, {result.nfe} NFE, guidance {result.guidance:g}, {result.n:,} samples"
    bias = "" if result.bias is None else f"; as many random real samples score about {number(result.bias)}"
    return f"{number(result.value)} ({sampling}{bias})"
