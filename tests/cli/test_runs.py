"""Commands about runs: train, explain, replay, report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import refused, succeeds, write_config
from worlds import tiny_config

import fewstep
from fewstep.api.training_progress import TrainingProgress
from fewstep.cli.demo import EMOJI, FASHION, TEXT, VIDEO, unfinished
from fewstep.cli.train import in_gib
from fewstep.core.errors import UserError
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.objectives import OBJECTIVES
from fewstep.distill.trainer import Trainer


def test_replay_and_report_of_a_run(finished: Path) -> None:
    assert "Step 7 replayed bit for bit" in succeeds("replay", finished, "--step", 7)
    succeeds("report", finished)
    assert "<html" in (finished / "report.html").read_text()


def test_explain_counts_evaluations_without_weights(tmp_path: Path) -> None:
    changes = ["stages.0.objective.name=dmd2", "stages.0.objective.steps=1", "stages.0.objective.critic_updates=2"]
    file = write_config(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    text = " ".join(succeeds("explain", file, *changes).split())
    assert "student: min 1/2 | x - sg(" in text
    # the student once with gradient, the guided teacher twice, the fake once; then the fake on the same kind of sample
    assert "student 0 + 1, teacher 2 + 0, fake 1 + 0" in text
    assert "every 2 steps" in text
    assert "over all roles: 3.5." in text
    assert "critic_updates │ 2 │ 5 │ 5, 10 (SD1.5)" in text, "here, by default, published"
    assert "student.lr │ 0.001 │ │ 2e-6 (ImageNet-64), 1e-5 (SD1.5), 5e-7 (SDXL)" in text


def test_amounts_of_memory_have_two_digits_however_small() -> None:
    assert [in_gib(size) for size in (0, 6_000_000, 2**29, 20 * 2**30)] == ["0", "0.0056", "0.50", "20.00"]


def test_explain_plans_memory_and_prints_overrides_that_it_accepts(tmp_path: Path) -> None:
    base = ["explain", "configs/fashion/demo.yaml", "batch=16", "device=cpu"]
    text = " ".join(succeeds(*base, "--memory", "0.04,1").split())
    assert "1 GiB: fits." in text
    overrides = (
        text.partition("0.04 GiB: does not fit as it is; ")[2].partition(" with ")[2].partition(" 1 GiB:")[0].split()
    )
    assert overrides[0].startswith("batch=")
    (stage,) = json.loads(succeeds(*base, *overrides, "--memory", "0.04", "--devices", 2, "--json", "-"))
    memory = stage["memory"]
    assert memory["total"] == memory["resident"] + max(memory["peaks"].values())
    assert memory["fits"] == [{"gib": 0.04, "overrides": [], "total": memory["total"]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24,x"], "numbers separated by commas"),
        (["--memory", "-1"], "sizes in GiB above 0"),
        (["--memory", "nan"], "sizes in GiB above 0"),
        (["--devices", "2"], "--devices is for --memory"),
        (["--memory", "24", "teacher=owner/unknown"], "give a folder with them"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "explain", "configs/fashion/demo.yaml", *arguments)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_published_values_belong_to_settings_that_exist(objective: str) -> None:
    config = OBJECTIVES.resolve(objective)
    others = {"batch"} | {f"{role}.lr" for role in config().needs}
    assert set(config.published) <= set(config.model_fields) | others


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
    assert f"--resume {tmp_path / 'run'}" in "".join(errors.split("\n")).replace("--resume", "--resume ").replace(
        "  ", " "
    )
    assert "Traceback" not in errors
    (stopped,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(stopped.name.removeprefix("step-"))
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("steps: 100000", f"steps: {step + 3}"))
    assert f"Trained {step + 3} steps" in succeeds("train", "--resume", tmp_path / "run")


def test_a_misspelt_key_in_the_file_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path, sede=3)
    message = refused(capsys, "train", file)
    assert str(file) in message
    assert "unknown key 'sede'; did you mean 'seed'" in message
    message = refused(capsys, "train", write_config(tmp_path), "stages.0.stepz=3")
    assert "the override 'stages.0.stepz=3': unknown key 'stages.0.stepz'; did you mean 'steps'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("stages.0.objective.times=nested", "renoise_times"),
        ("stages.0.roles.student.decay=cosine", "lr_schedule"),
        ("stages.0.roles.fake.whole=true", "full_finetune"),
    ],
)
def test_an_old_key_is_answered_with_the_new_one(
    override: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "train", write_config(tmp_path), override)
    assert f"unknown key {override.partition('=')[0]!r}; it is now called {new!r}." in message


def test_a_config_that_is_missing_or_not_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'configs/fashion/tdm.yaml'" in refused(capsys, "train", "configs/fashion/tmd.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: 3")
    assert "is not valid YAML" in refused(capsys, "train", tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "must contain a mapping of settings, key: value; it contains a list" in refused(
        capsys, "train", tmp_path / "list.yaml"
    )
    assert "Name a config" in refused(capsys, "train")
    message = refused(capsys, "explain", "configs/fashion/objectives.yaml")
    assert "use fewstep bench objectives configs/fashion/objectives.yaml" in message


@pytest.mark.parametrize("override", ["seed", "=3", "stages.first.steps=2", "stages.3.steps=2", "seed.x=1", "seed=[1"])
def test_an_override_that_cannot_be_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert repr(override) in refused(capsys, "train", write_config(tmp_path), override)


def test_a_config_needs_a_run_folder_and_something_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tiny_config(tmp_path)
    (tmp_path / "no_out.yaml").write_text(yaml.safe_dump({k: v for k, v in raw.items() if k != "out"}))
    assert "The key 'out'" in refused(capsys, "train", tmp_path / "no_out.yaml")
    (tmp_path / "nothing.yaml").write_text(yaml.safe_dump({k: v for k, v in raw.items() if k != "teacher"}))
    assert "neither teacher (to distil) nor model (to pretrain)" in refused(capsys, "train", tmp_path / "nothing.yaml")
    assert not (tmp_path / "run").exists()


def test_resume_takes_no_config_and_no_change_that_makes_another_run(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "leave it out" in refused(capsys, "train", "--resume", finished, "configs/fashion/demo.yaml")
    assert "cannot change this when it is resumed: seed" in refused(capsys, "train", "--resume", finished, "seed=1")


def test_a_run_is_not_overwritten_and_a_folder_that_is_not_one_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not empty" in refused(capsys, "train", finished / "config.yaml")
    for command in (["report", tmp_path], ["replay", tmp_path, "--step", "1"], ["train", "--resume", tmp_path]):
        assert "not a run folder" in refused(capsys, *command)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished)
    shutil.rmtree(unfinished / "student")
    shutil.rmtree(unfinished / "checkpoints")
    assert "has no student yet, and no checkpoint" in refused(capsys, "sample", unfinished)


def test_an_unwritable_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    message = refused(capsys, "train", write_config(tmp_path), f"out={tmp_path}/file/run")
    assert "Cannot create the run folder" in message


def test_missing_images_of_a_pretraining_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "configs/fashion/teacher.yaml", f"data.path={tmp_path}", f"out={tmp_path}/run")
    assert "No train-images-idx3-ubyte.gz" in message
    assert "data.path" in message


def test_a_role_that_the_objective_does_not_train_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "train", write_config(tmp_path), "stages.0.roles.studnet.lr=1e-3")
    assert "stages.0.roles.studnet: the objective 'tdm' does not train this role; did you mean 'student'?" in message


def test_an_objective_needs_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "objective.name: give the name" in refused(
        capsys, "explain", write_config(tmp_path), "stages.0.objective={}"
    )


def test_an_own_run_is_not_resumed_as_a_demo(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "mine")
    (tmp_path / "mine" / "report.html").unlink(missing_ok=True)
    assert "contains another run than the demo" in refused(capsys, "demo", "--out", tmp_path / "mine")


def test_a_demo_beside_a_finished_one_says_where_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").touch()
    shutil.copytree(finished, tmp_path / "mine-2", ignore=shutil.ignore_patterns("report.html"))
    message = refused(capsys, "demo", "--out", tmp_path / "mine")
    assert f"{tmp_path}/mine contains a finished demo: this one is in {tmp_path}/mine-2." in message


def test_each_demo_is_a_config_with_a_folder_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert {load_config(each.config).out: each.folder for each in (EMOJI, VIDEO, FASHION, TEXT)} == {
        name: Path(name) for name in ("runs/demo", "runs/demo_video", "runs/demo_fashion", "runs/demo_text")
    }
    assert "Give one of --video, --fashion and --text" in refused(capsys, "demo", "--fashion", "--text")


def test_a_replay_that_differs_is_reported(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    changed = [line | {"loss/critic": line["loss/critic"] + 1e-9} if line["step"] == 7 else line for line in lines]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in changed))
    assert "did not replay bit for bit" in refused(capsys, "replay", tmp_path / "run", "--step", 7)


def test_python_refuses_a_config_beside_a_run_to_resume(finished: Path) -> None:
    with pytest.raises(UserError, match="give changes as key=value"):
        fewstep.train("configs/fashion/demo.yaml", resume=finished)
    with pytest.raises(UserError, match="Give a config, or a run folder"):
        fewstep.train()


def test_explain_shows_every_stage() -> None:
    first, second = json.loads(succeeds("explain", "configs/wan/phased_dmd.yaml", "--json", "-"))
    student = {update["name"]: update["evaluations"] for update in second["updates"]}["student"]
    assert "expert1" in student
    assert "expert1" not in str(first["updates"])


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    assert "All 12 steps of this run were done already" in succeeds("train", "--resume", finished)


def test_each_finding_of_the_diagnosis_is_printed_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trainer = Trainer.create(parse_config(tiny_config(tmp_path), "test"), device="cpu")
    with TrainingProgress(12) as progress:
        for _ in range(3):
            progress.on_log(trainer, {"health/diversity_ratio": 0.1})
    assert capsys.readouterr().out.count("the student collapses") == 1


def test_a_demo_takes_the_next_folder_once_one_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert unfinished(folder) == folder
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
        assert unfinished(folder) == tmp_path / name, "begun, but without a report"
        (tmp_path / name / "report.html").touch()
    assert unfinished(folder) == tmp_path / "demo-3"
