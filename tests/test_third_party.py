"""A package of somebody else's, installed with pip: its network and objective are found by entry points, and a model
folder that names them causes no import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-fewstep"
version = "1.0"

[project.entry-points."fewstep.backbone"]
acme = "acme.network:Net"

[project.entry-points."fewstep.objective"]
acme_objective = "acme.objective:PlainMatching"

[tool.setuptools]
packages = ["acme"]
"""

NETWORK = '''
import torch
from torch import nn


class Net(nn.Module):
    """A tiny network for images [B, 1, 8, 8] of three classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, width)
        self.enter, self.leave = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x_t, t, condition):
        bias = self.labels(condition["labels"])[:, :, None, None] + t.to(x_t)[:, None, None, None]
        return self.leave(torch.tanh(self.enter(x_t) + bias))
'''

OBJECTIVE = '''
from fewstep.distill.objectives.dmd import DMD


class PlainMatching(DMD):
    """One-step matching without a regression term."""

    regression: float = 0.0
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the package into."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "acme").mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("network", NETWORK), ("objective", OBJECTIVE)):
        (source / "acme" / f"{name}.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        source,
    ]
    subprocess.run([*map(str, command), "--disable-pip-version-check"], check=True, capture_output=True)
    return site


def fewstep(site: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fewstep", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def teacher(folder: Path, site: Path, name: str) -> None:
    """A model folder whose backbone has this name."""
    code = f"""
import sys, torch, fewstep, acme.network
torch.manual_seed(0)
config = fewstep.ModelConfig(backbone={{"name": {name!r}, "width": 6}}, shape=(1, 8, 8), classes=3)
fewstep.save_model(config.build(), config, {str(folder)!r})
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_network_and_objective_are_found_by_their_entry_points(site: Path, tmp_path: Path) -> None:
    teacher(tmp_path / "teacher", site, "acme")
    roles = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    config = {
        "out": "run", "teacher": "teacher", "batch": 4, "device": "cpu",
        "stages": [{"steps": 3, "objective": "acme_objective", "roles": roles}],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    explained = fewstep(site, "explain", "config.yaml", cwd=tmp_path)
    assert "One-step matching without a regression term." in explained.stdout, explained.stderr
    trained = fewstep(site, "train", "config.yaml", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    sampled = fewstep(site, "sample", "run", "--n", 3, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "grid.png").is_file()
    again = fewstep(site, "train", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    missing = fewstep(tmp_path / "no_site", "train", "config.yaml", cwd=tmp_path)
    assert missing.returncode == 1
    assert "Unknown objective 'acme_objective'" in missing.stderr


def test_a_downloaded_model_that_names_the_package_is_refused_and_nothing_is_imported(
    site: Path, tmp_path: Path
) -> None:
    teacher(tmp_path / "downloaded", site, "acme.network:Net")
    assert json.loads((tmp_path / "downloaded" / "config.json").read_text())["backbone"]["name"] == "acme.network:Net"
    code = """
import sys
import fewstep
try:
    fewstep.load("downloaded", device="cpu")
except fewstep.UserError as error:
    assert "has not been imported" in str(error), error
    assert "--import acme.network" in str(error), error
else:
    raise AssertionError("it was loaded")
assert not [name for name in sys.modules if name.startswith("acme")]
import acme.network
assert fewstep.sample("downloaded", n=3, device="cpu").shape == (3, 1, 8, 8)
"""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    refused = fewstep(site, "sample", "downloaded", "--n", 3, cwd=tmp_path)
    assert refused.returncode == 1
    assert "neither ever causes an import" in " ".join(refused.stderr.split())
    assert not (tmp_path / "grid.png").exists()
    allowed = fewstep(site, "--import", "acme.network", "sample", "downloaded", "--n", 3, cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
