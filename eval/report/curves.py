"""The report's charts: quality against NFE, validation, and what was logged in training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from fewstep.eval.report.charts import Chart, Line, chart
from fewstep.eval.report.ranking import best_of
from fewstep.eval.report.run_files import Entry, Result
from fewstep.eval.report.score_table import ARROWS

COST_AXES = {
    "step": "training step",
    "seconds": "seconds of training",
    "evaluations": "network evaluations in training",
}
NFE = "NFE (network evaluations per sample)"
MINIMUM_POINTS = 3  # of the longest line of a chart; fewer are said in words or in the table
MAXIMUM_SOLVERS = 3  # of a teacher in one chart; more become one line of the best


def quality_curves(results: Sequence[Result]) -> list[Chart]:
    """Each metric against NFE, at the largest number of samples that teacher and student share: the student's points,
    and one line per model and solver of the teacher (or one of the best solver), with the best guidance for each NFE.
    A metric of unknown direction has one line per guidance."""
    charts = []
    for column in dict.fromkeys(result.column for result in results):
        own = [result for result in results if result.column == column]
        if not (counts := _common_counts(own)):
            continue
        lines = _lines([result for result in own if result.n == max(counts)])
        if max(len(line.points) for line in lines) >= MINIMUM_POINTS:
            caption = f"{column} {ARROWS[own[0].direction]}".strip() + f", {max(counts):,} samples"
            charts.append(
                chart(caption, "NFE (network evaluations per sample)", lines, y_axis=own[0].metric, log_x=True)
            )
    return charts


def incomparable(results: Sequence[Result]) -> list[str]:
    """The metrics without a chart because teacher and student have no number of samples in common."""
    columns = dict.fromkeys(result.column for result in results)
    return [column for column in columns if not _common_counts([r for r in results if r.column == column])]


def _common_counts(results: Sequence[Result]) -> set[int]:
    """The numbers of samples at which every role was scored that was scored at all."""
    return set.intersection(*({r.n for r in results if r.role == role} for role in {r.role for r in results}))


def _lines(results: Sequence[Result]) -> list[Line]:
    """Teachers first, so that students are drawn over them."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.role == "student"):
        guidance = () if result.direction else (f"guidance {result.guidance:g}",)
        groups.setdefault((*result.setting[:3], *guidance), []).append(result)
    teachers = [key for key in groups if key[0] == "teacher"]
    if len(teachers) > MAXIMUM_SOLVERS and results[0].direction:
        best = sorted((result for key in teachers for result in groups.pop(key)), key=lambda result: result.nfe)
        groups = {("teacher", "", "best solver"): best} | groups
    lines = []
    for key, group in groups.items():
        rivals = [other for other in groups if other[0] == key[0]]
        varying = [i for i in range(len(key)) if len({other[i] for other in rivals}) > 1]
        name = " ".join(dict.fromkeys(str(part) for i, part in enumerate(key) if i in (0, 2, *varying)))
        lines.append(Line(name, _points(group), "D" if key[0] == "student" else "o-", key[0] == "student"))
    return lines


def _points(group: Sequence[Result]) -> list[tuple[float, float]]:
    direction = group[0].direction
    if direction is None:
        return [(result.nfe, result.value) for result in group]
    best = (best_of(list(same), direction) for _, same in groupby(group, key=lambda result: result.nfe))
    return [(result.nfe, result.value) for result in best]


def validation_curves(validations: Sequence[Entry]) -> list[Chart]:
    """The validation against each measure of cost, if there are enough points."""
    axes = [axis for axis in COST_AXES if validations and axis in validations[0]]
    return [_curve("validation", validations, axis, style="o-") for axis in axes if _enough("validation", validations)]


def training_curves(logged: Sequence[Entry]) -> list[tuple[str, list[Chart]]]:
    """One chart per logged quantity of enough points, grouped by the part of the name before the slash, losses first;
    dotted lines mark new stages."""
    names = {name for entry in logged for name in entry} - {*COST_AXES, "stage"}
    ordered = sorted(names, key=lambda name: (not name.startswith("loss/"), name))
    stages = [after["step"] for before, after in pairwise(logged) if before.get("stage") != after.get("stage")]
    groups = groupby((name for name in ordered if _enough(name, logged)), key=lambda name: name.partition("/")[0])
    return [(prefix, [_curve(name, logged, "step", stages) for name in group]) for prefix, group in groups]


def _enough(name: str, entries: Sequence[Entry]) -> bool:
    return sum(name in entry for entry in entries) >= MINIMUM_POINTS


def _curve(name: str, entries: Sequence[Entry], axis: str, marks: Sequence[float] = (), style: str = "-") -> Chart:
    points = [(entry[axis], entry[name]) for entry in entries if name in entry]
    return chart(name, COST_AXES[axis], [Line(name, points, style)], marks, y_axis=name)
