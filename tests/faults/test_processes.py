"""The real command on two processes (gloo): training, signals to one of them, a killed one, errors, resuming on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from commands import succeeds

from fewstep.distill.checkpoint import checkpoints, read_checkpoint

TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")

UNIFY = {
    "steps": 2,
    "objective": {"name": "tdm", "steps": 4, "unify": [1, 4]},
    "roles": {role: {"lr": 1e-4, "init": "new"} for role in ("student", "fake")},
}


def config(folder: Path, steps: int = 6, **changes: object) -> Path:
    """A short run of the bundled teacher, with validation and health checks."""
    stage = {
        "steps": steps,
        "objective": {"name": "dmd2", "steps": 1, "guidance": 1.3, "critic_updates": 1},
        "roles": {"student": {"lr": 1e-4, "ema": 0.9}, "fake": {"lr": 1e-4}},
    }
    settings: dict[str, object] = {
        "out": str(folder / "run"), "teacher": "fashion", "batch": 2, "accumulate": 2, "log_every": 1, "device": "cpu",
        "checkpoint": {"every": 2, "keep": 99}, "validation": {"every": 3, "n": 10},
        "health": {"every": 3, "conditions": 2, "seeds": 2, "teacher_steps": 2}, "stages": [stage],
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def start(
    launcher: tuple[str, ...], *arguments: object, script: Sequence[str] = ("-m", "fewstep")
) -> subprocess.Popen[str]:
    """``fewstep train`` on two processes, by the module or by a ``script`` that calls it."""
    port = 20_000 + (os.getpid() * 7 + time.monotonic_ns() // 1000) % 20_000
    at = "--main_process_port" if launcher is ACCELERATE else "--master-port"
    command = [sys.executable, "-m", *launcher, at, str(port), *script, "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What a launch printed until its end, which must come within a minute or two."""
    try:
        return process.communicate(timeout=150)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def pid_of(rank: int, launch: subprocess.Popen[str]) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    ranks = {f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"): int(pid) for pid in children}
    return ranks[True]


def pause(rank: int, launch: subprocess.Popen[str], seconds: float) -> None:
    """Makes a rank slow."""
    process = pid_of(rank, launch)
    os.kill(process, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(process, signal.SIGCONT)


def wait_for_step(folder: Path, step: int, launch: subprocess.Popen[str]) -> None:
    log = folder / "run" / "metrics.jsonl"
    for _ in range(600):
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        if launch.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached: {ended(launch)}")


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(checkpoints(run / "checkpoints")[-1])[0]


def test_two_processes_of_accelerate_train(tmp_path: Path) -> None:
    launch = start(ACCELERATE, config(tmp_path))
    text = ended(launch)
    assert launch.returncode == 0, text
    state = json.loads((tmp_path / "run/checkpoints/step-0000006/state.json").read_text())
    assert state["run"]["processes"] == 2


def test_two_processes_train_as_one_and_resume_on_one(tmp_path: Path) -> None:
    launch = start(TORCHRUN, config(tmp_path))
    text = ended(launch)
    assert launch.returncode == 0, text
    assert text.count("Trained 6 steps") == text.count("Device: cpu") == 1, "one process speaks"
    run, one = tmp_path / "run", tmp_path / "one"
    assert json.loads((run / "checkpoints/step-0000006/state.json").read_text())["run"]["processes"] == 2
    assert (run / "student" / "model.safetensors").is_file()
    assert len(list((run / "samples").iterdir())) == len(list((run / "previews").iterdir())) == 2
    said = succeeds("train", "--resume", run, "stages.0.steps=8", "log_every=2")
    assert "had 2 processes and has 1 now" in said
    succeeds("train", config(tmp_path), f"out={one}", "log_every=1")
    succeeds("train", "--resume", one, "stages.0.steps=8", "log_every=2")
    for ours, theirs in zip(log_of(run), log_of(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    expected = newest(one)
    for name, value in newest(run).items():
        assert torch.allclose(value.double(), expected[name].double(), atol=1e-6), name


def test_a_slow_process_is_waited_for_and_a_signal_to_it_stops_all_with_one_checkpoint(tmp_path: Path) -> None:
    launch = start(TORCHRUN, config(tmp_path, 5000, checkpoint={"every": 10_000}, validation={"every": 0}))
    wait_for_step(tmp_path, 5, launch)
    pause(1, launch, 3)
    reached = len(log_of(tmp_path / "run"))
    wait_for_step(tmp_path, reached + 5, launch)
    os.kill(pid_of(1, launch), signal.SIGTERM)
    text = ended(launch)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert text.count("Interrupted: stopped at step") == 1, text
    assert f"stopped at step {int(saved.name[5:])} of 5000 (SIGTERM)" in text
    assert text.count("Traceback") == 1, "torchrun's own"
    succeeds("train", "--resume", tmp_path / "run", f"stages.0.steps={int(saved.name[5:]) + 1}")


def test_a_killed_process_ends_the_other_with_words_and_the_run_resumes(tmp_path: Path) -> None:
    launch = start(TORCHRUN, config(tmp_path, 5000, validation={"every": 0}))
    wait_for_step(tmp_path, 5, launch)
    os.kill(pid_of(1, launch), signal.SIGKILL)
    text = ended(launch)
    assert launch.returncode != 0
    assert "unexpected;" not in text
    last = int(checkpoints(tmp_path / "run" / "checkpoints")[-1].name[5:])
    succeeds("train", "--resume", tmp_path / "run", f"stages.0.steps={last + 1}")


def test_mistakes_are_said_once_and_leave_nothing(tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, object], str]] = [
        ({"accumulate": 3}, "must be a multiple of 2"),
        ({"validation": {"every": 1, "n": 10, "reference": "nowhere"}}, "nowhere"),
        ({"seed": -1}, "seed = -1"),
        ({"shard": True, "stages": [UNIFY]}, "unify: a network that shard splits"),
    ]
    for changes, message in mistakes:
        launch = start(TORCHRUN, config(tmp_path, **changes))
        text = ended(launch)
        assert launch.returncode != 0
        (said,) = [line for line in text.splitlines() if line.startswith("Error")]
        assert message in said
    launch = start(TORCHRUN, config(tmp_path, 1))  # the folder is as good as empty
    assert "Trained 1 step" in ended(launch)


def test_an_error_of_one_process_is_raised_in_all(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, fewstep\n"
        "class Fails(fewstep.Callback):\n"
        "    def on_checkpoint(self, trainer):\n"
        "        if trainer.world.rank == 1:\n"
        "            raise fewstep.UserError('no space here')\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        f"        fewstep.train({str(config(tmp_path))!r}, callbacks=[Fails()])\n"
        "    except fewstep.UserError as error:\n"
        "        os.write(1, f\"{os.environ['RANK']}-saw-{error}\\n\".encode())\n"
    )
    command = [sys.executable, "-m", *TORCHRUN, "--master-port", str(20_000 + os.getpid() % 20_000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "own.py")], capture_output=True, text=True, env=environment, timeout=150, check=False
    )
    for rank in "01":
        assert f"{rank}-saw-Process 1: no space here\n" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sys.argv[2] = 'nowhere.yaml'", "Error in process 1: "),
        ("sys.argv.append('stages.0.roles.student.lr=2e-4')", "Error: Process 1 of this run differs from process 0"),
        (
            "import fewstep.distill.build as build; build.load_model = lambda *_: {}['gone']",
            "Error: Process 1: KeyError: 'gone' (unexpected)",
        ),
    ],
)
def test_a_mistake_of_one_process_is_said_once(change: str, message: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, sys\nif os.environ['RANK'] == '1':\n    {change}\nfrom fewstep.cli.main import main\nmain()\n"
    )
    launch = start(TORCHRUN, config(tmp_path), script=[str(script)])
    text = ended(launch)
    assert launch.returncode != 0
    (said,) = [line for line in text.splitlines() if line.startswith("Error")]
    assert said.startswith(message)


FAILS_IN_VALIDATION = """
    import datetime
    from fewstep.distill import processes
    from fewstep.eval.validation import Validation
    processes.APART = datetime.timedelta(seconds=3)
    called = Validation.__call__
    def fail(self, denoiser, config, step):
        if step == 3:
            raise MemoryError("no memory")
        return called(self, denoiser, config, step)
    Validation.__call__ = fail
"""
FAILS_IN_STEP = """
    from fewstep.distill.loop import Loop
    def fail(self, step):
        raise MemoryError("no memory")
    Loop.step = fail
"""


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (0, FAILS_IN_VALIDATION, "Error: MemoryError: no memory (unexpected"),
        (1, FAILS_IN_STEP, "Error in process 1: MemoryError: no memory (unexpected"),
    ],
)
def test_no_process_waits_for_one_that_failed_between_exchanges_of_a_split_network(
    rank: int, change: str, message: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import os\nif os.environ['RANK'] == '{rank}':\n    {change.strip()}\n"
        "from fewstep.cli.main import main\nmain()\n"
    )
    launch = start(TORCHRUN, config(tmp_path, shard=True), script=[str(script)])
    text = ended(launch)
    assert launch.returncode != 0
    said = [line for line in text.splitlines() if line.startswith("Error")]
    (cause,) = [line for line in said if "Another process of this run has ended" not in line]
    assert cause.startswith(message)
