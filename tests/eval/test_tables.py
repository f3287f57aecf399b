"""Tables of scores, and the file that they are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.core.errors import UserError
from fewstep.eval.report.tables import best_teacher, refreshed, rows, side_by_side
from fewstep.eval.score_files import Score, merged, read_scores


def score(value: float, **changes: object) -> Score:
    known: dict[str, object] = {
        "model": "fashion", "role": "teacher", "solver": "euler", "nfe": 4, "steps": 4, "guidance": 1.0, "n": 100,
        "metric": "fd", "seed": 0, "seconds": 2.0, "reference": "fashion/test", "features_sha256": "ab",
    }  # fmt: skip
    return Score.model_validate(known | changes | {"value": value})


STUDENT = {"model": "tdm", "role": "student", "solver": "student"}


def test_a_new_score_takes_the_place_of_the_same_setting_only() -> None:
    old = [score(1.0), score(2.0, guidance=2.0)]
    new = [score(3.0, seconds=9.0), score(4.0, seed=1)]
    assert [entry.value for entry in merged(old, new)] == [2.0, 3.0, 4.0]


def test_a_file_that_holds_no_scores_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="no readable file of scores"):
        read_scores(file)
    assert file.read_text() == '{"mine": 1}'


def test_the_teacher_is_shown_at_its_best_within_each_budget_and_students_always() -> None:
    scores = [
        score(5.0, nfe=3), score(4.0, nfe=4, guidance=2.0), score(9.0, nfe=4), score(0.1, nfe=4, metric="kid"),
        score(0.2, nfe=4, metric="kid", guidance=2.0), score(3.0, nfe=5), score(2.0, nfe=8),
        score(7.0, **STUDENT), score(8.0, nfe=2, **STUDENT),
    ]  # fmt: skip
    assert [entry.value for entry in best_teacher(scores)] == [4.0, 0.2, 2.0, 7.0, 8.0]


def test_rows_give_mean_and_deviation_over_seeds() -> None:
    head, teacher, student = rows(
        [score(2.0, **STUDENT), score(4.0, seed=1, seconds=4.0, **STUDENT), score(1.0, nfe=64)]
    )
    assert head == ["model", "solver", "guidance", "NFE", "fd", "n", "seeds", "seconds"]
    assert teacher == ["fashion", "euler", "1", "64", "1.000", "100", "0", "2"]
    assert student == ["tdm", "student", "1", "4", "3.000 ± 1.414", "100", "0 1", "3"]


def test_what_makes_two_scores_incomparable_is_said() -> None:
    def told(**changes: object) -> str:
        return side_by_side([score(1.0)], [score(2.0, **changes)])[1][-1]

    assert told(seed=1, protocol="fashion") == "yes", "one may have come by the protocol of the same settings"
    assert told(n=50, features_sha256="cd") == "no: other n, features_sha256"
    assert told(manifest={"protocol": {"name": "own", "n": 100, "size": 256}}) == "no: other size"


def test_a_comparison_is_of_students_and_images_and_of_teachers_where_there_is_nothing_else() -> None:
    a, b = score(1.0, n=50, guidance=2.0), score(2.0, **STUDENT)
    titles = [row[:2] for row in side_by_side([a, b], [a, b])[1:]]
    assert titles == [["tdm, student, 4 NFE"] * 2]
    assert side_by_side([a], [a])[1][0] == "fashion, euler, 4 NFE, guidance 2"


def test_a_block_is_made_anew_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([score(1.25).model_dump()]))
    page = "Text\n<!-- best scores: a.json -->\nold\n<!-- end -->\nmore"
    made = refreshed(page, tmp_path)
    assert "| fashion | euler | 1 | 4 | 1.250 | 100 | 0 | 2 |\n<!-- end -->\nmore" in made
    assert refreshed(made, tmp_path) == made
