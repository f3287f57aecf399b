"""Kills, failing disks and damaged data: a small part of ``benchmarks/faults.py``, and its committed counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from injected_faults import Event
from long_commands import COMMANDS, damage

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "faults"
FAULTS = ("kills", "disk", "data")


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_some_commands_survive_some_faults(tmp_path: Path) -> None:
    """In a process of its own: it forks, which needs a process without threads."""
    done = benchmark("--quick", "--only", *FAULTS, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in FAULTS}
    assert counts["kills"]["faults"] >= 16
    assert counts["disk"]["message"] >= 4
    assert counts["data"]["message"] >= 3


@pytest.mark.long
def test_every_command_survives_every_fault(tmp_path: Path) -> None:
    done = benchmark("--only", *FAULTS, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "least"), [("kills", 500), ("disk", 100), ("data", 100)])
def test_the_committed_counts_are_of_all_commands_and_without_a_problem(name: str, least: int) -> None:
    counts: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    assert counts["faults"] >= least
    assert counts["problems"] == 0
    if name != "data":
        assert counts["commands"].keys() == {command.name for command in COMMANDS}
    if name != "kills":
        assert counts["faults"] == counts["message"] + counts["unharmed"]


def test_what_is_missing_or_half_written_is_noticed(tmp_path: Path) -> None:
    """The check itself: a file that was renamed to its name and is gone, half a file, half a checkpoint."""
    events = [Event("rename", f"{tmp_path}/a.json.part", f"{tmp_path}/a.json"), Event("open", f"{tmp_path}/b")]
    assert damage(tmp_path, events) == ["a.json is missing"]
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "checkpoints" / "step-0000001").mkdir(parents=True)
    found = damage(tmp_path, events)
    assert len(found) == 2
    assert found[0].startswith("a.json: ")
    assert found[1].startswith("checkpoints/step-0000001: ")
    (tmp_path / "a.json").write_text("{}")
    assert damage(tmp_path, [*events[:1], Event("remove", f"{tmp_path}/a.json")]) == found[1:]
