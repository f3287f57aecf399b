"""``bench objectives`` and ``bench step``; preferences created, learned from and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import refused, succeeds, write_config
from PIL import Image
from worlds import tiny_config, tiny_teacher

from fewstep.api import bench_cost
from fewstep.api.bench_objectives import load_benchmark, run_config_of
from fewstep.api.evaluate import known_teacher_scores
from fewstep.core.files import read_tensors
from fewstep.distill.config_files import load_config
from fewstep.distill.explain import explain
from fewstep.eval.score_files import Score, write_scores


def test_bench_step_reports_a_paired_ratio(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    text = succeeds("bench", "step", write_config(tmp_path), "--rounds", 2, "--json", file)
    result = json.loads(file.read_text())
    assert result["ratio"] > 0
    assert result["evaluations_a_cycle"] >= 5
    assert f"takes {1000 * result['seconds_full']:,.1f} ms" in text
    assert f"alone {1000 * result['seconds_bare']:,.1f} ms: {result['ratio']:.2f} times as long" in text


def test_the_other_benchmarks_print_units(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = {"seconds_full": 0.5, "seconds_bare": 0.4, "ratio": 1.25, "ratio_same_mode": 1.1, "evaluations": 3}
    monkeypatch.setattr(bench_cost, "bench_sampler", lambda *_: sampler | {"device": "cpu"})
    memory = {"adapters": {"parameters": 2**29, "peak": 2**30}, "copies": {"parameters": 2**30, "peak": 3 * 2**30}}
    monkeypatch.setattr(bench_cost, "bench_memory", lambda *_: memory | {"device": "cpu"})
    printed = succeeds("bench", "sampler", "fashion") + succeeds("bench", "memory", "configs/fashion/demo.yaml")
    lines = printed.splitlines()
    assert "takes 500.0 ms, its 3 network evaluations alone 400.0 ms: 1.25 times as long, or 1.10 times" in lines[0]
    assert lines[1] == "With adapters: 0.500 GiB of weights, 1.000 GiB at the peak of training (cpu)."
    assert lines[2] == "With copies: 1.000 GiB of weights, 3.000 GiB at the peak of training (cpu)."


def test_objectives_get_the_same_evaluations_and_finished_runs_are_kept(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    phase = {"objective": {"name": "phased_dmd", "critic_updates": 1}, "roles": roles}
    second = {"objective": {"name": "phased_dmd", "critic_updates": 1, "phase": 2}, "roles": roles}
    settings = {
        "out": str(tmp_path / "out"), "evaluations": 600, "seeds": [0, 1], "steps": [2], "n": 100,
        "reference": str(squares),
        "base": {
            "teacher": str(tiny_teacher(tmp_path / "teacher")), "batch": 8,
            "validation": {"every": 2, "n": 20, "reference": str(squares)},
        },
        "methods": {
            "tdm": {"stages": [{"objective": {"name": "tdm", "steps": 2}, "roles": roles}]},
            "phased": {"stages": [phase, {**second, "freeze": {"expert1": "student"}}]},
        },
    }  # fmt: skip
    file = tmp_path / "objectives.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert "±" in succeeds("bench", "objectives", file)
    scores = json.loads((tmp_path / "out" / "objectives.json").read_text())
    distances = {(score["model"], score["seed"]): score["value"] for score in scores if score["metric"] == "fd_squares"}
    assert set(distances) == {("tdm", 0), ("tdm", 1), ("phased", 0), ("phased", 1)}
    for name in ("tdm", "phased"):
        config = load_config(tmp_path / "out" / f"{name}-0" / "config.yaml")
        costs = [stage.evaluations_per_step for stage in explain(config)]
        spent = sum(8 * stage.steps * cost for stage, cost in zip(config.stages, costs, strict=True))
        assert spent == pytest.approx(600, abs=8 * 5)  # each stage to half a step
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert {method: len(seeds) for method, seeds in curves.items()} == {"tdm": 2, "phased": 2}
    assert all(points[-1][0] == pytest.approx(600, abs=8 * 5) for seeds in curves.values() for points in seeds)
    with Image.open(tmp_path / "out" / "frontier.png") as image:
        assert image.width == 1300
    before = (tmp_path / "out" / "tdm-0" / "metrics.jsonl").stat().st_mtime_ns
    succeeds("bench", "objectives", file)
    assert (tmp_path / "out" / "tdm-0" / "metrics.jsonl").stat().st_mtime_ns == before
    lengths = set()  # rollouts have random lengths: the seed must not change the budget
    for seed in (0, 1, 2):
        own = load_benchmark(file, ["evaluations=60000", f"seeds=[{seed}]"])
        lengths.add(tuple(stage.steps for stage in run_config_of(own, "phased").stages))
    assert len(lengths) == 1
    half, whole = (load_benchmark(file, ["evaluations=60000", f"methods.tdm.spent={n}"]) for n in (30_000, 0))
    steps, all_steps = (run_config_of(benchmark, "tdm").stages[0].steps for benchmark in (half, whole))
    assert steps == pytest.approx(all_steps / 2, rel=0.01), "evaluations spent on data are missing in training"
    assert "a run of other settings" in refused(capsys, "bench", "objectives", file, "evaluations=900")
    message = refused(capsys, "bench", "objectives", file, "methods.tdm.spend=3")
    assert "the override 'methods.tdm.spend=3': unknown key 'methods.tdm.spend'; did you mean 'spent'?" in message


def test_preferences_are_created_learned_and_measured(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, pairs = tiny_teacher(tmp_path / "teacher"), tmp_path / "pairs.safetensors"
    how = ["--reference", squares, "--solver", "euler", "--steps", 2]
    command = ["data", "preferences", teacher, *how]
    succeeds(*command, "--out", pairs, "--reward", "brightness", "--n", 30, "--candidates", 3)
    tensors = read_tensors(pairs)
    winner, loser = (tensors[name].flatten(1).clamp(-1, 1).mean(1) for name in ("winner", "loser"))
    assert (winner >= loser).all()
    assert (winner > loser).any()
    assert tensors["labels"].tolist() == [k % 10 for k in range(30)]
    raw = tiny_config(tmp_path, data={"kind": "tensors", "path": str(pairs)})
    objective = {"name": "diffusion_dpo", "beta": 1000}
    role = {"student": {"lr": 1e-3}}
    raw["stages"] = [{"steps": 60, "objective": objective, "roles": role, "freeze": {"reference": "teacher"}}]
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(raw))
    succeeds("train", tmp_path / "dpo.yaml")
    file = tmp_path / "wins.json"
    succeeds("winrate", tmp_path / "run", teacher, "--n", 200, "--json", file, *how)
    rates = {row["reward"]: row for row in json.loads(file.read_text())}
    assert rates["brightness"]["low"] > 0.5
    assert rates["brightness"]["ours"] > rates["brightness"]["theirs"]
    shown = succeeds("winrate", tmp_path / "run", teacher, "--n", 200, *how)
    assert f"{rates['symmetry']['win_rate']:.3f}" in shown
    bad = [*command, "--out", tmp_path / "x", "--n", 2]
    assert "brightness" in refused(capsys, *bad, "--reward", "brightnes")
    assert "two candidates" in refused(capsys, *bad, "--reward", "brightness", "--candidates", 1)
    assert not (tmp_path / "x").exists()


def test_only_scores_with_the_same_features_are_taken_from_the_teacher(tmp_path: Path) -> None:
    run, teacher = tmp_path / "run", tiny_teacher(tmp_path / "teacher")
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    common = {"role": "teacher", "solver": "heun", "nfe": 4, "steps": 2, "guidance": 1.0, "metric": "fd", "n": 9}
    common |= {"seed": 0, "seconds": 1.0, "reference": "x/test"}
    scores = [Score(model=name, value=1.0, features_sha256=name, **common) for name in ("ours", "another")]
    write_scores(scores, teacher / "eval.json")
    assert known_teacher_scores(run, {"ours"}) == scores[:1]
    assert known_teacher_scores(tmp_path, {"ours"}) == [], "not a run"
