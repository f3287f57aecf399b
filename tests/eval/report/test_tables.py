"""Tables of scores, which of them are best, and the files of scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.core.errors import UserError
from fewstep.eval.report.ranking import direction_of
from fewstep.eval.report.tables import best_teacher, rows, side_by_side
from fewstep.eval.score_files import Score, merge, read_scores, write_scores


def score(value: float, **changes: object) -> Score:
    known: dict[str, object] = {
        "model": "fashion", "role": "teacher", "solver": "euler", "nfe": 4, "steps": 4, "guidance": 1.0, "n": 100,
        "metric": "fd_fashion", "seed": 0, "seconds": 2.0, "reference": "fashion/test", "features_sha256": "ab",
        "reference_sha256": "12",
    }  # fmt: skip
    return Score.model_validate(known | changes | {"value": value})


STUDENT = {"model": "tdm", "role": "student", "solver": "student"}


def test_a_new_score_replaces_only_one_of_the_same_setting() -> None:
    old = [score(1.0), score(2.0, guidance=2.0)]
    new = [score(3.0, seconds=9.0), score(4.0, seed=1)]
    assert [entry.value for entry in merge(old, new)] == [2.0, 3.0, 4.0]


def test_a_file_without_scores_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="not a readable file of scores"):
        read_scores(file)
    assert file.read_text() == '{"mine": 1}'


def test_teachers_are_shown_at_their_best_within_each_budget_and_students_always() -> None:
    scores = [
        score(5.0, nfe=3), score(4.0, nfe=4, guidance=2.0), score(9.0, nfe=4), score(0.1, nfe=4, metric="kid"),
        score(0.2, nfe=4, metric="kid", guidance=2.0), score(3.0, nfe=5), score(2.0, nfe=8),
        score(7.0, **STUDENT), score(8.0, nfe=2, **STUDENT),
    ]  # fmt: skip
    assert [entry.value for entry in best_teacher(scores)] == [4.0, 0.2, 2.0, 7.0, 8.0]
    other = score(1.0, nfe=4, reference="other/test")
    assert [entry.value for entry in best_teacher([*scores, other])] == [4.0, 0.2, 2.0, 7.0, 8.0, 1.0]


def test_the_best_teacher_is_the_one_in_the_direction_of_the_metric() -> None:
    def best(metric: str) -> list[float]:
        return [s.value for s in best_teacher([score(v, metric=metric, guidance=v) for v in (2.0, 3.0, 1.0)])]

    assert best("kid") == [1.0]
    assert best("clip_score") == [3.0]
    assert best("sharpness") == [2.0, 3.0, 1.0], "an unknown metric has no best"
    assert best_teacher([]) == []


def test_the_direction_of_a_score_is_that_of_its_metric() -> None:
    """Finding E12: it used to be guessed from the beginning of the name."""
    directions = {name: direction_of(score(1.0, metric=name)) for name in (
        "clip_fid", "fvd", "similarity", "inception_score", "prompt", "fd_mnist", "cliphanger", "my_metrics:NORM",
    )}  # fmt: skip
    assert directions == {
        "clip_fid": "lower", "fvd": "lower", "similarity": "lower", "inception_score": "higher", "prompt": "higher",
        "fd_mnist": "lower", "cliphanger": None, "my_metrics:NORM": None,
    }  # fmt: skip
    recorded = {"directions": {"my_metrics:NORM": "higher"}}
    assert direction_of(score(1.0, metric="my_metrics:NORM", manifest=recorded)) == "higher"
    for damaged in ("higher", {"my_metrics:NORM": "up"}):
        assert direction_of(score(1.0, metric="my_metrics:NORM", manifest={"directions": damaged})) is None


def test_rows_give_mean_and_deviation_over_seeds() -> None:
    head, teacher, student = rows(
        [score(2.0, **STUDENT), score(4.0, seed=1, seconds=4.0, **STUDENT), score(1.0, nfe=64)]
    )
    assert head == ["model", "solver", "guidance", "NFE", "fd_fashion", "n", "seeds", "seconds"]
    assert teacher == ["fashion", "euler", "1", "64", "1.000", "100", "0", "2"]
    assert student == ["tdm", "student", "1", "4", "3.000 ± 1.414", "100", "0 1", "3"]


def test_the_differences_that_make_two_scores_incomparable_are_listed() -> None:
    def comparable(**changes: object) -> str:
        return side_by_side([score(1.0)], [score(2.0, **changes)])[1][-1]

    assert comparable(seed=1, protocol="fashion") == "yes", "a protocol of the same settings"
    assert comparable(n=50, features_sha256="cd") == "no: different n, network weights"
    assert comparable(manifest={"protocol": {"name": "own", "n": 100, "size": 256}}) == "no: different size"
    assert comparable(reference="./fashion/test") == "yes", "contents decide, not paths"
    assert comparable(reference_sha256="34") == "no: different reference"
    assert comparable(reference_sha256=None) == "unknown: contents of reference are not recorded"
    assert comparable(reference_sha256=None, reference="other") == "no: different reference"


def test_the_columns_of_a_comparison_have_different_names() -> None:
    (head,) = side_by_side([], [])
    assert len(set(head)) == len(head)


def test_models_of_one_name_have_rows_of_their_own() -> None:
    a, b = (score(value, source=f"{place}/samples", source_sha256=place) for value, place in ((1.0, "d1"), (2.0, "d2")))
    assert [row[0] for row in rows([a, b])[1:]] == ["fashion (d1/samples)", "fashion (d2/samples)"]
    retrained = b.model_copy(update={"source": a.source})
    assert [row[0] for row in rows([a, retrained])[1:]] == ["fashion (d1)", "fashion (d2)"]
    assert [row[0] for row in rows([a, a.model_copy(update={"seed": 1})])[1:]] == ["fashion"]


def test_an_error_within_a_score_is_in_brackets_and_the_deviation_over_seeds_is_not() -> None:
    a = score(1.0, error=0.25, error_of="standard deviation over 100 subsets", metric="kid")
    assert rows([a])[1][4] == "1.000 (± 0.250)"
    assert a.notes() == ["kid: in brackets, standard deviation over 100 subsets."]
    assert rows([a, a.model_copy(update={"seed": 1, "value": 2.0})])[1][4] == "1.500 ± 0.707"


def test_a_value_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fd_fashion of fashion is nan"):
        write_scores([score(float("nan"))], tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


def test_teachers_are_compared_only_if_a_file_contains_nothing_else() -> None:
    a, b = score(1.0, n=50, guidance=2.0), score(2.0, **STUDENT)
    titles = [row[:2] for row in side_by_side([a, b], [a, b])[1:]]
    assert titles == [["tdm, student, 4 NFE"] * 2]
    assert side_by_side([a], [a])[1][0] == "fashion, euler, 4 NFE, guidance 2"


def test_scores_on_two_grids_or_two_references_are_not_seeds_of_one_setting() -> None:
    """They were once averaged, and their distance was shown as the deviation over seeds."""
    on_karras = score(3.0, grid="karras")
    body = rows([score(1.0), score(2.0, seed=1), on_karras, score(9.0, reference="fashion/train")])[1:]
    assert [(row[1], row[4], row[6]) for row in body] == [
        ("euler", "1.500 ± 0.707", "0 1"), ("euler on karras", "3.000", "0"), ("euler", "9.000", "0"),
    ]  # fmt: skip
    assert [row[0] for row in body] == ["fashion against fashion/test"] * 2 + ["fashion against fashion/train"]
    compared = side_by_side([score(1.0), on_karras], [score(2.0), on_karras])[1:]
    assert [(row[0], row[3], row[4]) for row in compared] == [
        ("fashion, euler, 4 NFE", "1.000", "2.000"), ("fashion, euler on karras, 4 NFE", "3.000", "3.000"),
    ]  # fmt: skip
