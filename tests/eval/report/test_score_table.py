"""The report's scores: averages over seeds, the best values, the summary and the charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.eval.report.charts import COLOURS
from fewstep.eval.report.curves import NFE, incomparable, quality_curves
from fewstep.eval.report.run_files import Result, read_results
from fewstep.eval.report.score_table import Cell, columns, explanations, origins, table, verdict


def score(role: str, solver: str, nfe: int, value: float, **other: Any) -> dict[str, Any]:
    return {
        "model": "fashion" if role == "teacher" else "tdm", "role": role, "solver": solver, "nfe": nfe, "steps": nfe,
        "guidance": 1.0, "metric": "fd_fashion", "value": value, "n": 10000, "seed": 0, "seconds": 12.5,
        "reference": "fashion/test", "features_sha256": "0123456789abcdef" * 4,
    } | other  # fmt: skip


def results(folder: Path, *scores: dict[str, Any]) -> list[Result]:
    (folder / "eval.json").write_text(json.dumps(scores))
    return read_results(folder / "eval.json", [])


def texts(rows: list[list[Cell]]) -> list[list[str]]:
    return [[f"*{cell.text}*" if cell.best else cell.text for cell in row] for row in rows]


def test_the_table_averages_seeds_and_marks_the_best_of_each_metric(tmp_path: Path) -> None:
    """Lower is better for distances, higher for precision; different numbers of samples do not compete."""
    found = results(
        tmp_path,
        score("student", "student", 4, 4.0),
        score("student", "student", 4, 4.4, seed=1),
        score("student", "student", 4, 0.8, metric="precision"),
        score("teacher", "euler", 32, 3.5),
        score("teacher", "euler", 32, 0.75, metric="precision"),
        score("teacher", "euler", 64, 3.0, n=50000),
    )
    assert columns(found) == {"fd_fashion": "↓", "precision": "↑"}
    student, teacher = table(found)
    assert (student[0], teacher[0]) == ("student tdm · student", "teacher fashion · euler")
    assert texts(student[1]) == [["4", "4", "1", "4.200 ± 0.283", "*0.8000*", "10,000", "0, 1", "12.5"]]
    assert texts(teacher[1]) == [
        ["32", "32", "1", "*3.500*", "0.7500", "10,000", "0", "12.5"],
        ["64", "64", "1", "*3.000*", "–", "50,000", "0", "12.5"],
    ]
    assert "The teacher's best at any NFE is 3.500" in " ".join(verdict(found))


def test_a_metric_with_two_references_has_two_columns(tmp_path: Path) -> None:
    found = results(
        tmp_path, score("student", "student", 4, 4.0), score("student", "student", 4, 5.0, reference="fashion/train")
    )
    ((_, rows),) = table(found)
    assert [row[3:5] for row in texts(rows)] == [["*4.000*", "*5.000*"]]
    assert list(columns(found).values()) == ["↓", "↓"], "the direction is that of the metric, not of the column"


@pytest.mark.parametrize(("metric", "best"), [("fvd", "0.2500"), ("inception_score", "4.000"), ("sharpness", None)])
def test_only_a_metric_of_known_direction_has_a_best_value_and_a_verdict(
    metric: str, best: str | None, tmp_path: Path
) -> None:
    """Finding E12: the first value of any other metric used to count as the best."""
    found = results(
        tmp_path, *(score("teacher", "euler", 4, value, metric=metric, guidance=value) for value in (1.0, 4.0, 0.25))
    )
    ((_, rows),) = table(found)
    assert [cell.text for row in rows for cell in row if cell.best] == ([best] if best else [])
    sentences = verdict(found)
    assert (best is None) == (sentences == [])
    if best:
        assert sentences[0].startswith(f"The teacher's best {metric} is {best} ")


def test_the_verdict_prefers_a_metric_of_known_direction(tmp_path: Path) -> None:
    """And metrics for which lower is better to others."""
    values = {"aesthetics": 5.0, "precision": 0.5, "kid": 0.1}
    found = results(tmp_path, *(score("student", "student", 4, v, metric=name) for name, v in values.items()))
    assert verdict(found)[0].startswith("The student's best kid is 0.1000 ")
    assert verdict([result for result in found if result.metric != "kid"])[0].startswith("The student's best precision")


def test_the_verdict_compares_the_student_with_the_teacher_at_the_same_and_at_any_nfe(tmp_path: Path) -> None:
    student = score("student", "student", 4, 4.0)
    teachers = [
        score("teacher", "euler", 4, 10.0),
        score("teacher", "heun", 4, 8.0, guidance=2.0, steps=1),
        score("teacher", "euler", 8, 5.0),
    ]
    sentences = verdict(results(tmp_path, student, *teachers))
    assert sentences[0] == "The student's best fd_fashion is 4.000 (student, 4 NFE, guidance 1, 10,000 samples)."
    assert sentences[1].startswith(
        "The teacher's best at the same NFE is 8.000 (heun, 4 NFE, guidance 2, 10,000 sample"
    )
    assert sentences[1].endswith("; the student's is 0.50 times that.")
    assert sentences[2].startswith("The teacher's best at any NFE is 5.000 (euler, 8 NFE")
    assert sentences[3] == "The teacher matches it at none of the measured NFE."
    better = score("teacher", "euler", 32, 3.2)
    assert verdict(results(tmp_path, student, *teachers, better))[3] == "The teacher needs 32 NFE to match it."


def test_scores_from_different_numbers_of_samples_are_not_compared(tmp_path: Path) -> None:
    found = results(tmp_path, score("student", "student", 4, 4.0, n=1000), score("teacher", "euler", 32, 3.0))
    sentences = " ".join(verdict(found))
    assert "The teacher was scored on a different number of samples, so the two are not compared." in sentences
    assert "times that" not in sentences


def test_a_chart_shows_the_best_guidance_for_each_nfe_or_all_if_the_direction_is_unknown(tmp_path: Path) -> None:
    def label(metric: str) -> str:
        scores = [
            score("teacher", "euler", nfe, value / nfe, metric=metric, guidance=value)
            for nfe in (2, 4, 8)
            for value in (1.0, 2.0)
        ]
        (chart,) = quality_curves(results(tmp_path, *scores))
        return chart.svg

    assert f"fid ↓, 10,000 samples against {NFE}: teacher euler from 0.5 to 0.125" in label("fid")
    assert f"clip_score ↑, 10,000 samples against {NFE}: teacher euler from 1 to 0.25" in label("clip_score")
    both = "teacher euler guidance 1 from 0.5 to 0.125; teacher euler guidance 2 from 1 to 0.25"
    assert f"sharpness, 10,000 samples against {NFE}: {both}" in label("sharpness")


def test_teacher_and_student_are_charted_at_the_largest_number_of_samples_they_share(tmp_path: Path) -> None:
    def run(*student: int) -> list[Result]:
        teachers = [score("teacher", "euler", nfe, 8 / nfe, n=n) for nfe in (2, 4, 8) for n in (500, 10_000)]
        return results(tmp_path, *teachers, *(score("student", "student", 4, 1.0, n=n) for n in student))

    for counts, shown in (((500,), "500"), ((500, 10_000), "10,000")):
        (chart,) = quality_curves(run(*counts))
        assert chart.caption == f"fd_fashion ↓, {shown} samples"
        assert "teacher euler from 4 to 1; student from 1 to 1" in chart.svg
        assert incomparable(run(*counts)) == []
    assert quality_curves(run(2_000)) == []
    assert incomparable(run(2_000)) == ["fd_fashion"]


def test_a_chart_needs_three_points_and_shows_many_solvers_as_the_best(tmp_path: Path) -> None:
    def charts(solvers: int, points: int) -> list[str]:
        teachers = [score("teacher", f"s{k}", nfe, 8 / nfe + k) for k in range(solvers) for nfe in range(2, 2 + points)]
        return [
            chart.svg for chart in quality_curves(results(tmp_path, *teachers, score("student", "student", 4, 1.0)))
        ]

    assert charts(1, 2) == []
    (few,) = charts(3, 3)
    assert "teacher s0 from 4 to 2; teacher s1 from 5 to 3; teacher s2 from 6 to 4; student from 1 to 1" in few
    (many,) = charts(4, 3)
    assert "teacher best solver from 4 to 2; student from 1 to 1" in many
    assert few.index(COLOURS[1]) < few.index(COLOURS[0]), "the student is drawn over the others, in the first colour"


def test_error_bars_and_biases_stand_beside_their_numbers(tmp_path: Path) -> None:
    found = results(
        tmp_path, score("student", "student", 4, 4.0, bias=1.25),
        score("student", "student", 4, 0.5, metric="kid", error=0.125, error_of="standard deviation over 100 subsets"),
    )  # fmt: skip
    ((_, (row,)),) = table(found)
    assert [cell.notes for cell in row[3:5]] == [("real samples ≈ 1.250",), ("error ± 0.1250",)]
    assert explanations(found)[0] == "Error of kid: standard deviation over 100 subsets."
    assert len(explanations(found)) == 2


def test_columns_of_several_origins_have_short_names(tmp_path: Path) -> None:
    """A score of an earlier version, without hashes, shares the column of a new one; two known contents do not."""
    old = score("student", "student", 4, 4.0)
    new, changed = (score("student", "student", k, 5.0, reference_sha256=d * 64) for k, d in ((2, "1"), (1, "2")))
    assert list(columns(results(tmp_path, old, new))) == ["fd_fashion"]
    found = results(tmp_path, new, changed)
    assert set(columns(found)) == {"fd_fashion [1]", "fd_fashion [2]"}
    assert origins(found)["fd_fashion [1]"] == "fashion/test, features 0123456789ab, contents 111111111111"


def test_scores_by_protocols_of_other_settings_are_never_averaged(tmp_path: Path) -> None:
    a, b = (score("student", "student", 4, v, protocol=h, protocol_sha256=h * 64) for v, h in ((4.0, "a"), (6.0, "b")))
    ((_, (row,)),) = table(results(tmp_path, a, b))
    assert [cell.text for cell in row[3:5]] == ["4.000", "6.000"]
    ((_, (row,)),) = table(results(tmp_path, a, a | {"value": 5.0}))
    assert row[3].text == "5.000", "of equal evaluations the last counts"


def test_a_solver_on_another_grid_has_its_own_rows_and_its_own_line(tmp_path: Path) -> None:
    """Of two grids with one seed, the last score once replaced the first."""
    found = results(
        tmp_path,
        *(score("teacher", "euler", nfe, 1.0 * nfe) for nfe in (2, 4, 8)),
        *(score("teacher", "euler", nfe, 0.5 * nfe, grid="karras") for nfe in (2, 4, 8)),
    )
    (plain, rows), (other, other_rows) = table(found)
    assert (plain, other) == ("teacher fashion · euler", "teacher fashion · euler on karras")
    assert [row[3].text for row in rows] == ["2.000", "4.000", "8.000"]
    assert [row[3].text for row in other_rows] == ["1.000", "2.000", "4.000"]
    assert "euler on karras, 2 NFE" in " ".join(verdict(found))
    (chart,) = quality_curves(found)
    assert "euler on karras" in chart.svg
