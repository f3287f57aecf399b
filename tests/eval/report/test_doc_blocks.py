"""Tables and numbers in the documentation, computed from small result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.registry import BUILTIN
from fewstep.eval.references import load_reference
from fewstep.eval.report.doc_blocks import main, refresh, value

SCORE = {
    "model": "m", "role": "student", "solver": "student", "nfe": 4, "steps": 4, "guidance": 1.0, "n": 10,
    "metric": "fd", "seed": 0, "seconds": 1.0, "reference": "r/test", "features_sha256": "ab", "value": 0.5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results."""

    def write(name: str, content: Any) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    teacher = {"model": "t", "role": "teacher", "solver": "euler"}
    write("students.json", [SCORE, SCORE | {"seed": 1, "value": 0.7}, SCORE | {"nfe": 1, "steps": 1, "value": 9.0}])
    teachers = [SCORE | teacher | {"value": 2.0}, SCORE | teacher | {"nfe": 8, "value": 0.6}]
    write("teacher.json", teachers)
    write("mixed.json", [*teachers, SCORE | teacher | {"n": 5, "value": 0.1}])
    write("bench.json", {"ratio": 1.25, "host": {"seconds": 0.5}, "runs": [{"a": 3}], "[0.25, 0.95].x": {"200": 7}})
    curves = {"1": 0.25, "2": 0.125}, {"2": 1.0}
    rates = [("one", 0.5, curves[0]), ("two", 1.0, curves[1])]
    write("records.json", [{"name": name, "rate": rate, "curve": curve} for name, rate, curve in rates])
    write("named.json", {"first": [{"a": 1.0}, {"a": 3.0}], "second": [{"a": 2.0}, {"a": 2.0}]})
    for seed, rate in enumerate((0.8, 0.6)):
        write(f"wins-{seed}.json", [{"reward": "symmetry", "win_rate": rate, "low": rate - 0.1}])
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 4.0}\n{"step": 3}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("bench.json ratio", "1.250"),
        ("bench.json host.seconds : .1f", "0.5"),
        ("bench.json runs.0.a : d", "3"),
        ('bench.json "[0.25, 0.95].x.200" : .0f', "7"),
        ("last log.jsonl loss : .1f", "4.0"),
        ("mean log.jsonl loss", "3.500"),
        ("geomean log.jsonl loss : .2f", "3.46"),
        ("max students.json nfe=4 value", "0.700"),
        ("students.json nfe=4 seed=1 guidance=1 value", "0.700"),
        ("mean students.json nfe=4 value / min mixed.json n=10 value : .2f", "1.00"),
    ],
)
def test_a_number_is_selected_reduced_divided_and_formatted(query: str, text: str, folder: Path) -> None:
    assert value(query, folder) == text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("students.json value", "3 entries have value"),
        ("students.json nfe=3 value", "0 entries have value"),
        ("bench.json ration", "0 entries have ration"),
        ("missing.json ratio", "missing.json"),
        ("mean students.json model=other value", "cannot be computed"),
    ],
)
def test_a_number_that_cannot_be_computed_is_an_error_that_shows_the_block(
    query: str, message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        refresh(f"so <!-- value: {query} -->1<!-- /value -->", folder)
    assert query in str(caught.value)


def test_a_reference_gives_the_distance_of_its_training_images() -> None:
    folder = Path(__file__).resolve().parents[3] / "eval" / "reference"
    train, test = (load_reference("fashion", split).statistics for split in ("train", "test"))
    assert value("fashion training_images : .6f", folder) == f"{frechet_distance(train, test):.6f}"


def table(block: str, folder: Path) -> list[str]:
    """The rows that a block generates, without header and rule."""
    text = f"before\n<!-- {block} -->\nold\n<!-- end -->\nafter"
    made = refresh(text, folder)
    assert refresh(made, folder) == made
    assert made.startswith(f"before\n<!-- {block} -->\n| ")
    assert made.endswith("|\n<!-- end -->\nafter")
    assert "old" not in made
    return [line.strip("| ") for line in made.splitlines() if line.startswith("|")][2:]


def test_the_table_of_metrics_has_what_each_declares(folder: Path) -> None:
    lines = {line.split(" | ")[0].strip("`"): line for line in table("metrics: all", folder)}
    assert list(lines) == [metric.name for metric in BUILTIN]
    assert [cell.strip() for cell in lines["patch_fid"].split(" | ")] == [
        "`patch_fid`", "lower", "`inception_patch`", "Fréchet distance of Gaussian fits", "2",
        "reference, images of 299 pixels or more", "standard error over samples (jackknife, 10 groups)",
    ]  # fmt: skip
    assert "| 2 per class or caption | classes or captions" in lines["diversity"]
    assert " | captions | " in lines["clip_score"]
    assert "reference, videos" in lines["fvd"]
    assert all(metric.computation for metric in BUILTIN), "none is without a description"


def test_runs_of_one_name_are_seeds_of_the_training(folder: Path) -> None:
    for role in ("student", "teacher"):
        runs = [SCORE | {"role": role, "seed": k, "value": 0.5 + k, "source": f"runs/m-{k}", "source_sha256": str(k)}
                for k in (1, 2)]  # fmt: skip
        (folder / "runs.json").write_text(json.dumps(runs))
        [row] = table("best scores: runs.json", folder)
        assert "2.000 ± 0.707" in row
        assert "1 2" in row
    (folder / "runs.json").write_text(json.dumps([runs[0], runs[1] | {"seed": 1}]))
    with pytest.raises(ValueError, match=r"two runs of one name and seed in runs\.json"):
        table("best scores: runs.json", folder)


def test_best_scores_have_all_settings_of_students_and_the_teachers_best(folder: Path) -> None:
    teacher, better, one, four = table("best scores: teacher.json students.json", folder)
    assert teacher.split(" | ")[:5] == ["t", "euler", "1", "4", "2.000"]
    assert better.split(" | ")[3:5] == ["8", "0.600"]
    assert one.split(" | ")[:5] == ["m", "student", "1", "1", "9.000"]
    assert four.split(" | ")[3:5] == ["4", "0.600 ± 0.141"]


def test_relative_scores_are_students_at_their_best_beside_the_teacher(folder: Path) -> None:
    assert table("relative scores: students.json / mixed.json", folder) == [
        "t | euler | 1 | 4 | 2.000 | 3.33 |".strip("| "),
        "t | euler | 1 | 8 | 0.600 | 1.00 |".strip("| "),
        "m | student | 1 | 4 | 0.600 ± 0.141 | 1.00 | 1 of 2",
    ]


def test_win_rates_are_of_all_files_of_a_label(folder: Path) -> None:
    assert table("win rates: mine=wins-0.json mine=wins-1.json", folder) == ["mine | 0.700 ± 0.141 (0.500)"]


def test_findings_are_those_of_the_diagnosis_at_the_first_step_that_shows_them(folder: Path) -> None:
    lines = [{"step": step, "health/sd_ratio": ratio} for step, ratio in ((10, 1.0), (20, 0.5), (30, 0.4))]
    (folder / "pale.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pale, healthy = table("findings: pale=pale.jsonl other=log.jsonl", folder)
    assert pale.startswith("`pale` | 20 | ")
    assert "0.50" in pale
    assert healthy == "`other` |  | nothing"


def test_records_show_numbers_curves_and_spreads(folder: Path) -> None:
    assert table("records: records.json", folder) == ["one | 0.5 | 0.250, 0.125", "two | 1 | –, 1.000"]
    assert table("records: named.json", folder) == ["`first` | 2.000 ± 1.414", "`second` | 2.000 ± 0.000"]


def test_an_unknown_kind_of_table_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind of table 'beste scores'; known: best scores, relative"):
        refresh("<!-- beste scores: a.json -->\n<!-- end -->", folder)


def test_other_comments_stay_and_pages_are_rewritten_in_place(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text("<!-- a note: of mine --> x <!-- value: bench.json ratio : .1f -->9<!-- /value -->\ny\n")
    main([str(page)])
    assert (
        page.read_text() == "<!-- a note: of mine --> x <!-- value: bench.json ratio : .1f -->1.2<!-- /value -->\ny\n"
    )
