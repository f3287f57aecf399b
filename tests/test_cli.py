"""The console script, through the real command: what it writes, and that mistakes end in one paragraph."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from worlds import tiny_config, tiny_teacher, write_idx

from fewstep.api.bench_objectives import entry, load_shootout
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.distill.config import load_config, objective_module, objective_names
from fewstep.distill.explain import show


def fewstep(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "fewstep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that fails as it should, with exit code 1 or 2. In this process, to be quick."""
    before, sys.argv = sys.argv, ["fewstep", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        sys.argv = before
    assert exit_.value.code in (1, 2)
    captured = capsys.readouterr()
    message = " ".join((captured.out + captured.err).split())
    assert "Traceback" not in message
    assert "unforeseen" not in message
    return message


def write_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.yaml.txt"
    file.write_text(yaml.safe_dump(tiny_config(folder, **changes)))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    done = fewstep("train", write_config(folder))
    assert done.returncode == 0, done.stderr
    assert "Trained 12 steps" in done.stdout
    return folder / "run"


def test_sample_writes_a_picture_that_depends_only_on_its_seed(finished: Path, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = fewstep(
            "sample", finished, "--steps", 2, "--labels", "0,1,2", "--n", 6, "--seed", seed, "--out", tmp_path / name
        )
        assert done.returncode == 0, done.stderr
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    with Image.open(tmp_path / "a") as picture:
        assert picture.size == (3 * 16 + 2, 2 * 16 + 1)


def test_replay_and_report_of_a_run(finished: Path) -> None:
    done = fewstep("replay", finished, "--step", 7)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Step 7 replayed bit for bit" in done.stdout
    done = fewstep("report", finished)
    assert done.returncode == 0, done.stderr
    assert "<html" in (finished / "report.html").read_text()


def test_show_explains_a_config_and_counts_its_evaluations(tmp_path: Path) -> None:
    changes = ["stages.0.objective.name=dmd2", "stages.0.objective.steps=1", "stages.0.objective.critic_updates=2"]
    done = fewstep("show", write_config(tmp_path), *changes)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "student: min 1/2 | x - sg(" in text
    # the student once with gradient, the guided teacher twice, the fake once; then the fake on the same kind of sample
    assert "student 0 + 1, teacher 2 + 0, fake 1 + 0" in text
    assert "one step in 2" in text
    assert "over all roles: 3.5." in text
    assert "critic_updates │ 2 │ 5 │ 5, 10 (SD1.5)" in text, "here, by default, published"
    assert "student.lr │ 0.001 │ │ 2e-6 (ImageNet-64), 1e-5 (SD1.5), 5e-7 (SDXL)" in text


@pytest.mark.parametrize("objective", objective_names())
def test_what_is_published_belongs_to_a_setting_that_exists(objective: str) -> None:
    config = objective_module(objective).Config
    others = {"batch"} | {f"{role}.lr" for role in config().needs}
    assert set(config.published) <= set(config.model_fields) | others


def test_bench_step_reports_a_paired_ratio(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = fewstep("bench", "step", write_config(tmp_path), "--rounds", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["ratio"] > 0
    assert result["evaluations_a_cycle"] >= 5


def test_interrupting_training_writes_a_checkpoint_and_resuming_finishes(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, checkpoint={"every": 100_000})
    raw["stages"][0]["steps"] = 100_000  # type: ignore[index]
    (tmp_path / "long.txt").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "fewstep", "train", str(tmp_path / "long.txt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (not metrics.exists() or metrics.stat().st_size < 2000) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    (stopped,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(stopped.name.removeprefix("step-"))
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("steps: 100000", f"steps: {step + 3}"))
    done = fewstep("train", "--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"Trained {step + 3} steps" in done.stdout


def test_misspelt_key_in_the_file_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path, sede=3)
    message = refused(capsys, "train", file)
    assert str(file) in message
    assert "unknown key 'sede'; did you mean 'seed'" in message
    message = refused(capsys, "train", write_config(tmp_path), "stages.0.stepz=3")
    assert "the override 'stages.0.stepz=3': unknown key 'stages.0.stepz'; did you mean 'steps'" in message
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_missing_or_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'configs/fashion/tdm.yaml'" in refused(capsys, "train", "configs/fashion/tmd.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: 3")
    assert "is not valid YAML" in refused(capsys, "train", tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "a mapping of settings was expected" in refused(capsys, "train", tmp_path / "list.yaml")


@pytest.mark.parametrize("override", ["seed", "=3", "stages.first.steps=2", "stages.3.steps=2", "seed.x=1", "seed=[1"])
def test_an_override_that_cannot_be_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert repr(override) in refused(capsys, "train", write_config(tmp_path), override)


def test_missing_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", write_config(tmp_path), "teacher=fashon")
    assert "No model at 'fashon'" in message
    assert "did you mean 'fashion'" in message


def test_corrupt_and_foreign_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path)
    weights = tmp_path / "teacher" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights} is not a readable safetensors file" in refused(capsys, "train", file)
    write_tensors({"something": torch.zeros(3)}, weights)
    assert "does not belong to this network" in refused(capsys, "train", file)
    weights.write_bytes(whole)
    tensors = read_tensors(weights)
    tensors["enter.weight"] = tensors["enter.weight"][:2]
    write_tensors(tensors, weights)
    message = refused(capsys, "train", file)
    assert "enter.weight has shape" in message
    assert "the network needs" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "eular", "--steps", "4"], "Unknown solver 'eular'; did you mean 'euler'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--labels", "3,10"], "Labels must be between 0 and 9, got [10]"),
        (["--labels", "shoe"], "--labels takes numbers separated by commas"),
        (["--n", "0"], "n must be at least 1"),
        (["--device", "cpuu"], "Unknown device 'cpuu'; did you mean 'cpu'"),
        (["--out", "/proc/none/grid.png"], "Cannot write /proc/none/grid.png"),
    ],
)
def test_sample_refuses_bad_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    assert message in refused(capsys, "sample", teacher, "--out", tmp_path / "x.png", *arguments)
    assert not (tmp_path / "x.png").exists()


def test_a_teacher_has_no_student_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    assert "no distilled student" in refused(capsys, "sample", teacher, "--solver", "student", "--steps", "4")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of 8 x 8 images, made by the command from idx files."""
    folder = tmp_path_factory.mktemp("squares")
    numbers = torch.Generator().manual_seed(0)
    for split, n in (("train", 200), ("test", 100)):
        labels = torch.arange(n) % 10
        images = (torch.randint(0, 128, (n, 8, 8), generator=numbers) + 12 * labels[:, None, None]).to(torch.uint8)
        write_idx(folder, images, labels.to(torch.uint8), split)
    done = fewstep("reference", folder, "--out", folder / "squares", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "test_accuracy" in done.stdout
    return folder / "squares"


def test_scores_are_merged_into_their_file(squares: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    command = ["eval", tiny_teacher(tmp_path / "teacher"), "--reference", squares, "--json", file]
    done = fewstep(*command, "--n", 100, "--nfe", 4, "--guidance", "1,2", "--solver", "euler")
    assert done.returncode == 0, done.stderr
    scores = json.loads(file.read_text())
    assert {(score["nfe"], score["steps"], score["guidance"]) for score in scores} == {(4, 4, 1.0), (4, 2, 2.0)}
    assert {score["role"] for score in scores} == {"teacher"}
    done = fewstep(*command, "--n", 100, "--steps", 4, "--solver", "euler")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(file.read_text())) == len(scores), "the same setting again replaces its scores"
    done = fewstep(*command, "--n", 100, "--steps", 4, "--solver", "euler", "--name", "other")
    assert done.returncode == 0, done.stderr
    assert {score["model"] for score in json.loads(file.read_text())} == {"teacher", "other"}


def test_a_shootout_gives_every_method_the_same_evaluations_and_keeps_what_is_finished(
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
    (tmp_path / "shootout.yaml").write_text(yaml.safe_dump(settings))
    done = fewstep("shootout", tmp_path / "shootout.yaml")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out" / "shootout.json").read_text())
    distances = {(score["model"], score["seed"]): score["value"] for score in scores if score["metric"] == "fd_squares"}
    assert set(distances) == {("tdm", 0), ("tdm", 1), ("phased", 0), ("phased", 1)}
    assert "±" in done.stdout
    for name in ("tdm", "phased"):
        config = load_config(tmp_path / "out" / f"{name}-0" / "config.yaml")
        views = show(config)
        spent = sum(8 * stage.steps * view.evaluations_a_step for stage, view in zip(config.stages, views, strict=True))
        assert spent == pytest.approx(600, abs=8 * 5)  # each stage to half a step
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert {method: len(seeds) for method, seeds in curves.items()} == {"tdm": 2, "phased": 2}
    assert all(points[-1][0] == pytest.approx(600, abs=8 * 5) for seeds in curves.values() for points in seeds)
    with Image.open(tmp_path / "out" / "frontier.png") as picture:
        assert picture.width == 1300
    before = (tmp_path / "out" / "tdm-0" / "metrics.jsonl").stat().st_mtime_ns
    assert fewstep("shootout", tmp_path / "shootout.yaml").returncode == 0
    assert (tmp_path / "out" / "tdm-0" / "metrics.jsonl").stat().st_mtime_ns == before
    lengths = set()  # rollouts are of random length: what a seed draws must not set the budget
    for seed in (0, 1, 2):
        own = load_shootout(tmp_path / "shootout.yaml", ["evaluations=60000", f"seeds=[{seed}]"])
        lengths.add(tuple(stage.steps for stage in entry(own, "phased").stages))
    assert len(lengths) == 1
    assert "a run of other settings" in refused(capsys, "shootout", tmp_path / "shootout.yaml", "evaluations=900")
    message = refused(capsys, "shootout", tmp_path / "shootout.yaml", "methods.tdm.spend=3")
    assert "the override 'methods.tdm.spend=3': unknown key 'methods.tdm.spend'; did you mean 'spent'?" in message


def test_preferences_are_made_learned_and_measured(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, pairs = tiny_teacher(tmp_path / "teacher"), tmp_path / "pairs.safetensors"
    way = ["--reference", squares, "--solver", "euler", "--steps", 2]
    done = fewstep("prefer", teacher, "--out", pairs, "--reward", "brightness", "--n", 30, "--candidates", 3, *way)
    assert done.returncode == 0, done.stderr
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
    assert fewstep("train", tmp_path / "dpo.yaml").returncode == 0
    file = tmp_path / "wins.json"
    done = fewstep("wins", tmp_path / "run", teacher, "--n", 200, "--json", file, *way)
    assert done.returncode == 0, done.stderr
    wins = {row["reward"]: row for row in json.loads(file.read_text())}
    assert wins["brightness"]["low"] > 0.5
    assert wins["brightness"]["ours"] > wins["brightness"]["theirs"]
    assert f"{wins['symmetry']['win_rate']:.3f}" in done.stdout
    bad = ["prefer", teacher, "--out", tmp_path / "x", *way, "--n", 2]
    assert "brightness" in refused(capsys, *bad, "--reward", "brightnes")
    assert "two candidates" in refused(capsys, *bad, "--reward", "brightness", "--candidates", 1)
    assert not (tmp_path / "x").exists()


def test_eval_refuses_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    assert "No reference 'fashon'" in refused(capsys, "eval", teacher, "--reference", "fashon")
    assert "n must be at least 20" in refused(capsys, "eval", teacher, "--n", "5")
    assert "steps must be at least 1" in refused(capsys, "eval", teacher, "--steps", "0")
    assert "uint8 images of shape [1, 28, 28]" in refused(capsys, "eval", teacher, "--n", "20", "--steps", "1")


def test_a_run_is_not_overwritten_and_a_folder_that_is_none_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not empty" in refused(capsys, "train", finished / "config.yaml")
    for command in (["report", tmp_path], ["replay", tmp_path, "--step", "1"], ["train", "--resume", tmp_path]):
        assert "no run" in (message := refused(capsys, *command)) or "not a run folder" in message
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    shutil.rmtree(unfinished / "student")
    assert "has no student yet" in refused(capsys, "sample", unfinished)


def test_an_unwritable_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    message = refused(capsys, "train", write_config(tmp_path), f"out={tmp_path}/file/run")
    assert "Cannot make the run folder" in message


def test_images_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(
        capsys, "pretrain", "configs/fashion/teacher.yaml", f"data.path={tmp_path}", f"out={tmp_path}/run"
    )
    assert "No train-images-idx3-ubyte.gz" in message
    assert "data.path" in message


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = fewstep("train", "nothing.yaml", "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert os.linesep.join(done.stderr.splitlines()[-1:]).startswith("Error: No config file 'nothing.yaml'")


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "fashion", "--solver", "ddim", "--json"),
        ("pairs", "fashion", "--out"),
        ("prefer", "fashion", "--reward", "symmetry", "--solver", "ddim", "--steps", 2, "--out"),
        ("ems", "fashion", "--out"),
        ("ratios", "fashion", "--out"),
        ("wins", "fashion", "fashion", "--solver", "ddim", "--steps", 2, "--json"),
        ("sweep", "fashion", "--solvers", "ddim", "--nfe", 4, "--out"),
        ("sample", "fashion", "--out"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of sampling was once lost because its folder did not exist."""
    for place in ("fewstep.samplers.generate.sample", "fewstep.api.data.estimate", "fewstep.api.data.search"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("it began"))
    assert "Cannot write" in refused(capsys, *arguments, "/proc/none/x.json")


def test_a_reference_that_cannot_be_written_is_refused_before_any_training(
    squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.eval.references.train_classifier", lambda *a, **k: pytest.fail("it began"))
    assert "Cannot write" in refused(capsys, "reference", squares.parent, "--out", "/proc/none")


def test_a_new_folder_is_made_for_a_result(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    out = tmp_path / "a" / "b"
    make.make_pairs(teacher, out / "pairs.safetensors", n=2, steps=2, device="cpu")
    measure.sweep(teacher, solvers=["ddim"], nfe=[2], folder=out / "sweep", n=2, long=4, device="cpu")
    assert sorted(file.name for file in out.rglob("*.*")) == [
        "long.safetensors", "pairs.safetensors", "sweep.json", "sweep.md", "sweep.png",
    ]  # fmt: skip
    with pytest.raises(UserError, match="is a folder; name a file"):
        make.make_pairs(teacher, out, n=2, steps=2, device="cpu")
