"""The scripts in ``examples/`` run, and are as short as they claim to be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_has_at_most_60_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60


def test_a_network_of_ones_own_is_distilled_in_plain_python(tmp_path: Path) -> None:
    distance = re.search(r"2 evaluations: (\d\.\d+)", run("own_network", cwd=tmp_path))
    assert distance is not None
    assert float(distance[1]) < 0.3, "untrained networks are 1.2 away, the data 0.07"
    assert not list(tmp_path.iterdir()), "it needs no folder"


def test_an_objective_and_a_solver_are_added_from_outside(tmp_path: Path) -> None:
    overrides = ["out=run", "stages.0.steps=2", "batch=4", "validation.every=0", "health.every=0", "device=cpu"]
    run("own_objective_and_solver", *overrides, cwd=tmp_path)
    assert "name: diff_instruct" in (tmp_path / "run" / "config.yaml").read_text()
    for name in ("student", "teacher"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert len(image.convert("L").getcolors(100_000) or []) > 20


def test_a_student_is_used_in_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "prompts.txt").write_text("a red sneaker on blue\na green bag on white\n")
    encode = ["data", "encode", "prompts.txt", "--teacher", "fashion-text", "--out", "prompts"]
    overrides = ["out=run", "stages.0.steps=2", "batch=2", "data.path=prompts", "validation.every=0", "health.every=0"]
    for arguments in (encode, ["train", "configs/fashion_text/demo.yaml", *overrides]):
        subprocess.run([sys.executable, "-m", "fewstep", *arguments], cwd=tmp_path, check=True, capture_output=True)
    text = run("student_in_diffusers", "run", "pipeline", "a red sneaker on blue", cwd=tmp_path)
    assert "4 steps at times [1.0, 0.75, 0.5, 0.25]" in text
    with Image.open(tmp_path / "pipeline" / "sample.png") as image:
        assert image.size == (32, 32)
