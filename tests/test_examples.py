"""The scripts in ``examples/`` run, and are as short as they claim to be."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_sets import write_images

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: object, cwd: Path, **variables: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
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


PYIQA = """
import torch


class InferenceModel(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weight = torch.nn.Parameter(weights["weight"])

    def forward(self, target, ref=None, **kwargs):
        assert target.dim() == 4 and target.min() >= 0 and target.max() <= 1
        return (self.weight * target.mean((1, 2, 3)))[:, None]


def create_metric(metric_name, as_loss=False, device=None, **kwargs):
    assert metric_name == "musiq" and set(kwargs) == {"pretrained_model_path"}
    return InferenceModel(torch.load(kwargs["pretrained_model_path"], weights_only=True)).to(device)
"""


def test_a_metric_of_a_package_is_added_from_outside(tmp_path: Path) -> None:
    """With a stand-in for pyiqa with the signatures of its version 0.1.16: its score is 100 times the brightness."""
    images = write_images(tmp_path / "images", 8, 0)
    (tmp_path / "pyiqa.py").write_text(PYIQA)
    torch.save({"weight": torch.tensor(100.0)}, tmp_path / "musiq_koniq_ckpt-e95806b9.pth")
    path = os.pathsep.join((str(tmp_path), str(EXAMPLES), os.environ.get("PYTHONPATH", "")))
    variables = {"PYTHONPATH": path, "FEWSTEP_WEIGHTS": str(tmp_path)}
    brightness = [100 * read_image(file).mean() / 255 for file in sorted(images.iterdir())]
    expected = statistics.fmean(brightness), statistics.stdev(brightness) / 8**0.5
    text = run("own_metric", images, cwd=tmp_path, **variables)
    assert text == f"musiq {expected[0]:.3f} ± {expected[1]:.3f} (8 images, standard error of the mean over images)\n"

    (tmp_path / "empty").mkdir()
    for arguments, message in (((), "python examples/own_metric.py IMAGES"), (("empty",), "empty contains no images")):
        failed = subprocess.run(
            [sys.executable, str(EXAMPLES / "own_metric.py"), *arguments], cwd=tmp_path, env=os.environ | variables,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert failed.returncode != 0
        assert message in failed.stderr

    (tmp_path / "own.yaml").write_text("{metrics: [musiq], n: 8}")
    command = ["--import", "own_metric", "eval", images, "--protocol", "own.yaml", "--json", "a.json"]
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", *map(str, command)], cwd=tmp_path, env=os.environ | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (score,) = json.loads((tmp_path / "a.json").read_text())
    assert score["value"] == pytest.approx(expected[0], abs=1e-3)
    assert score["manifest"]["directions"] == {"musiq": "higher"}
    assert score["manifest"]["networks"] == {"pyiqa_musiq": score["features_sha256"]}


def read_image(file: Path) -> Any:
    with Image.open(file) as image:
        return np.asarray(image, dtype=np.float64)


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
