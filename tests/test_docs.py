"""The documentation tells what is: its numbers are those of committed files, its commands and links exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import typer
from worlds import tiny_teacher

import fewstep
from fewstep.api.bench_objectives import entry, load_shootout
from fewstep.cli.main import app
from fewstep.distill import objectives
from fewstep.distill.config import CONFIGS, find_config, load_config, objective_names, parse_config
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.references import load_reference
from fewstep.eval.report.tables import BLOCK, refreshed
from fewstep.eval.score_files import Score, read_scores
from fewstep.eval.solver_comparison import at_their_best, cells, geometric_mean, read_lines

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")), *(ROOT / "docs").glob("*.md")]
CARD = ROOT / "models" / "pretrained" / "fashion" / "README.md"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", CARD, ROOT / "docs" / "methods.md"], ids=["README", "card", "methods"]
)
def test_tables_are_those_of_the_committed_results(page: Path) -> None:
    """Invariant 7."""
    text = page.read_text(encoding="utf-8")
    assert BLOCK.search(text), "no table of scores"
    assert refreshed(text, page.parent) == text, f"run: python -m fewstep.eval.tables {page.relative_to(ROOT)}"


def test_seconds_and_ratios_in_the_text_are_those_of_the_committed_results() -> None:
    def seconds(run: str) -> str:
        lines = (ROOT / "results" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return f"{json.loads(lines[-1])['seconds']:,.0f} s"

    text, card = ((page).read_text(encoding="utf-8") for page in (ROOT / "README.md", CARD))
    ratio = json.loads((ROOT / "results" / "bench_step.json").read_text(encoding="utf-8"))["ratio"]
    real = frechet_distance(*(load_reference("fashion", split).statistics for split in ("train", "test")))
    for page, number in ((text, seconds("demo")), (text, seconds("tdm")), (card, seconds("teacher"))):
        assert number in page
    assert f"[{ratio:.2f} times]" in text
    assert f"images score {real:.2f}" in " ".join(text.split()).replace("training images", "images")
    assert f"images score {real:.4f}" in " ".join(card.split())


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: page.parent.name + "/" + page.name)
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_objective_is_in_the_table_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert {name for name in objective_names() if f"| `{name}` |" not in text} == set()


def test_the_commands_of_the_readme_exist() -> None:
    group = typer.main.get_command(app)
    known = set(group.commands)  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    named = re.findall(r"^fewstep (\w+)(.*)", "\n".join(blocks), re.MULTILINE)
    assert len(named) >= 6
    for command, rest in named:
        assert command in known
        for config in re.findall(r"configs/\S+\.yaml", rest):
            assert find_config(config).is_file()


RUNS = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "eval")


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_config_that_ships_is_valid(file: Path) -> None:
    if file.stem in ("shootout", "trials"):
        settings = load_shootout(file)
        assert entry(settings, next(iter(settings.methods))).steps > 100
        for entrant in settings.methods.values():
            stages = [{**stage, "steps": 1} for stage in entrant.stages]
            parse_config({**settings.base, "data": entrant.data, "out": "x", "stages": stages}, str(file))
    else:
        assert load_config(file).steps > 0


def test_the_method_of_contributing_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code, settings = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("python", "yaml"))
    assert len(code[code.index("class Config") :].splitlines()) <= 35
    (tmp_path / "objectives").mkdir()
    (tmp_path / "objectives" / "diff_instruct.py").write_text(code)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path / "objectives")])
    (tmp_path / "config.yaml").write_text(settings)
    changes = [
        f"teacher={tiny_teacher(tmp_path / 'teacher')}",
        f"out={tmp_path / 'run'}",
        "stages.0.steps=3",
        "batch=4",
    ]
    run = fewstep.train(tmp_path / "config.yaml", *changes, "device=cpu")
    assert fewstep.sample(run, n=3, device="cpu").shape == (3, 1, 8, 8)


def test_the_tables_of_mixtures_are_the_committed_results() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "results" / "mixtures.json").read_text())
    for name, shares in results["lesser_mode"].items():
        assert f"| `{name}` | {shares['exact']:.3f} | {shares['learned']:.3f} |" in text
    for name, seeds in results["ring"].items():
        cells = [
            f"{mean([row[key] for row in seeds]):.3f} ± {stdev([row[key] for row in seeds]):.3f}"
            for key in ("in_a_mode", "entropy")
        ]
        modes = mean([row["modes"] for row in seeds])
        assert f"| {name} | {modes:.0f} of 8 | {' | '.join(cells)} |" in text


def test_what_is_told_of_the_methods_is_the_committed_shootout() -> None:
    text = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    best = min(s.value for s in read_scores(CARD.parent / "eval.json") if (s.metric, s.n) == ("fd_fashion", 10_000))
    assert f"teacher's best is {best:.3f}" in text
    scores = [s for s in read_scores(ROOT / "results" / "fashion_shootout.json") if s.metric == "fd_fashion"]
    distances = {m: mean(s.value for s in scores if s.model == m) for m in dict.fromkeys(s.model for s in scores)}
    for method in ("tdm", "phased_dmd", "dmd2", "decoupled_dmd", "cdm"):
        assert re.search(rf"`{method}` (is )?at {distances[method] / best:.2f}\b", text)
    assert all(s.value < best for s in scores if s.model == "tdm")
    assert [s.value < best for s in scores if s.model == "phased_dmd"].count(True) == 1
    assert distances["dmd2_one_step"] < min(distances["f_distill_one_step"], distances["dmd_one_step"])
    assert f"at {distances['dmd2_one_step'] / best:.2f} times the teacher's best" in text
    ours, weak, strong = json.loads((ROOT / "results" / "fashion_one_step_guidance.json").read_text(encoding="utf-8"))
    seeds = [s.value for s in scores if s.model == "dmd2_one_step"]
    assert f"at {strong['fd_fashion']:.3f} instead of {min(seeds):.3f} to {max(seeds):.3f}" in text
    after = [f"{run['validation']['600']:.3f}" for run in (weak, ours, strong)]
    assert "at {} in validation after 600 steps, where 1.3 and 1.7 are at {} and {}".format(*after) in text
    published, ours = json.loads((ROOT / "results" / "fashion_cdm_times.json").read_text(encoding="utf-8")).values()
    for step in ("200", "400"):
        assert f"{published[step]:.3f} and {ours[step]:.3f} after {step}" in text


def test_the_table_of_tdm_s_times_is_the_committed_results() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for run in json.loads((ROOT / "results" / "fashion_tdm_times.json").read_text(encoding="utf-8")):
        columns = [
            ", ".join(f"{run[key][step]:.3f}" if step in run[key] else "–" for step in ("400", "800", "1200", "1600"))
            for key in ("validation", "mean_drift")
        ]
        settings = f"| `{run['times']}` | {run['huber']:g} | {run['guidance']:g} | {run['fake']} | {run['seed']} |"
        assert f"{settings} {' | '.join(columns)} |" in text


def test_the_table_of_preferences_is_the_committed_results() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    folder = ROOT / "results" / "dpo"
    rows = {"student": ("tdm", "dpo"), "teacher": ("fashion", "dpo_teacher")}
    for who, (before, after) in rows.items():
        wins = [json.loads((folder / f"{who}_wins-{seed}.json").read_text()) for seed in range(3)]
        row = []
        for reward in ORDER:
            found = [line for lines in wins for line in lines if line["reward"] == reward]
            row.append(f"{spread([w['win_rate'] for w in found])} ({min(w['low'] for w in found):.3f})")
        scores = read_scores(folder / f"{who}_eval.json")
        for metric in ("fd_fashion", "diversity"):
            row.append(", ".join(spread(chosen(scores, model, metric)) for model in (before, after)))
        assert f"| {who} | {' | '.join(row)} |" in text, f"| {who} | {' | '.join(row)} |"


def chosen(scores: list[Score], model: str, metric: str) -> list[float]:
    found = {s.seed: s.value for s in scores if (s.model, s.metric) == (model, metric)}
    assert sorted(found) == [0, 1, 2]
    return list(found.values())


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


ORDER = ("symmetry", "confidence", "brightness")


def test_the_solvers_tables_are_those_of_the_committed_sweeps() -> None:
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    shares = {
        "unguided": {
            ("dpm_solver_v3_2", "dpmpp_2m"): "0.64 of", ("dpm_solver_v3_2", "unipc_2"): "0.84 of",
            ("dc_solver_2", "unipc_2"): "0.90 of",
        },
        "guided": {
            ("dc_solver_2", "unipc_2"): "0.97 of", ("dpm_solver_v3_2", "unipc_2"): "0.89 of",
            ("dpm_solver_v3_2", "dpmpp_2m"): "0.76 of",
        },
    }  # fmt: skip
    for name, told in shares.items():
        lines = at_their_best(read_lines(ROOT / "results" / "sweep" / f"{name}.json"))
        for row in cells(lines):
            assert f"| {' | '.join(row)} |" in text
        for (better, than), share in told.items():
            a, b = (geometric_mean([line.error for line in lines if line.solver == s]) for s in (better, than))
            assert f"{a / b:.2f} of" == share
            assert share in text
    a, b = (
        geometric_mean([line.value for line in lines if line.solver == s and line.value is not None])
        for s in ("dc_solver_2", "unipc_2")
    )
    assert f"{a / b:.2f} of its `fd_fashion`" in text
    (long,) = read_lines(ROOT / "results" / "sweep" / "guided_long.json")
    assert f"{long.steps} steps are themselves {long.error:.4f} away from {long.long}" in text


def test_what_a_step_of_a_solver_costs_is_the_committed_bench() -> None:
    text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    one, many = (json.loads((ROOT / "results" / f"bench_sampler_{batch}.json").read_text()) for batch in (1, 64))
    for bench, batch in ((one, 1), (many, 64)):
        assert f"[{bench['ratio']:.2f} times](../results/bench_sampler_{batch}.json)" in text
    assert f"in inference mode, too: {many['ratio_same_mode']:.2f} and {one['ratio_same_mode']:.2f}" in text
    assert f"a call takes {1000 * one['seconds_bare'] / one['steps']:.1f} ms" in text


def test_what_evaluation_costs_is_the_committed_bench() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    bench = json.loads((ROOT / "results" / "bench_eval.json").read_text())
    host, whole, frechet = (bench[part]["times_as_fast"] for part in ("host", "whole", "frechet"))
    assert f"is {host:.1f} times as fast" in text
    assert f"an Inception on the CPU {whole:.2f} times" in text
    assert f"is {frechet:.1f} times as fast as with scipy" in text
