"""The report's charts: quality against NFE, validation, and what was logged in training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from fewstep.eval.report.charts import Chart, Line, chart
from fewstep.eval.report.ranking import best_of
from fewstep.eval.report.run_files import Entry, Result

COST_AXES = ("step", "seconds", "evaluations")


def quality_curves(results: Sequence[Result]) -> list[Chart]:
    """Each metric against NFE: one line per role, model, solver and number of samples, with the best guidance for each
    NFE. A metric of unknown direction has one line per guidance."""
    charts = []
    for column in dict.fromkeys(result.column for result in results):
        groups: dict[tuple[object, ...], list[Result]] = {}
        for result in results:
            if result.column == column:
                guidance = () if result.direction else (f"guidance {result.guidance:g}",)
                groups.setdefault((*result.setting[:4], *guidance), []).append(result)
        lines = []
        for key, group in groups.items():
            rivals = [other for other in groups if other[0] == key[0]]
            varying = [i for i in range(len(key)) if len({other[i] for other in rivals}) > 1]
            name = " ".join(dict.fromkeys(str(part) for i, part in enumerate(key) if i in (0, 2, *varying)))
            lines.append(Line(name, _points(group), "D" if key[0] == "student" else "o-"))
        charts.append(chart(column, "NFE", lines, log_x=True))
    return charts


def _points(group: Sequence[Result]) -> list[tuple[float, float]]:
    direction = group[0].direction
    if direction is None:
        return [(result.nfe, result.value) for result in group]
    best = (best_of(list(same), direction) for _, same in groupby(group, key=lambda result: result.nfe))
    return [(result.nfe, result.value) for result in best]


def validation_curves(validations: Sequence[Entry]) -> list[Chart]:
    """The validation against each measure of cost."""
    axes = [axis for axis in COST_AXES if validations and axis in validations[0]]
    return [_curve("validation", validations, axis, style="o-") for axis in axes]


def training_curves(logged: Sequence[Entry]) -> list[tuple[str, list[Chart]]]:
    """One chart per logged quantity, grouped by the part of the name before the slash, losses first; dotted lines mark
    new stages."""
    names = {name for entry in logged for name in entry} - {*COST_AXES, "stage"}
    ordered = sorted(names, key=lambda name: (not name.startswith("loss/"), name))
    stages = [after["step"] for before, after in pairwise(logged) if before.get("stage") != after.get("stage")]
    groups = groupby(ordered, key=lambda name: name.partition("/")[0])
    return [(prefix, [_curve(name, logged, "step", stages) for name in group]) for prefix, group in groups]


def _curve(name: str, entries: Sequence[Entry], axis: str, marks: Sequence[float] = (), style: str = "-") -> Chart:
    points = [(entry[axis], entry[name]) for entry in entries if name in entry]
    return chart(name, axis, [Line(name, points, style)], marks)
