"""The page "Your own network and data in Python": its script, then its other block and commands, with fewer steps."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import succeeds
from PIL import Image

import fewstep
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.eval.score_files import read_scores

PAGE = (Path(__file__).parents[1] / "docs" / "own_network.md").read_text(encoding="utf-8")
FEWER = {
    '"steps": 2000': '"steps": 2', '"steps": 400': '"steps": 2', "draw(3000)": "draw(150)", "n=3000": "n=12",
    '"every": 50': '"every": 1, "n": 10', '"shapes.npz", "runs/': 'epochs=1, images="shapes.npz", out="runs/',
    '"width": 48': '"width": 8',
    "--n 3000": "--n 12",
}  # fmt: skip


def blocks(language: str) -> list[str]:
    page = PAGE
    for long, short in FEWER.items():
        assert long in page, f"the page has no {long}"
        page = page.replace(long, short)
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module in the current folder, which has run."""
    (tmp_path / "mine.py").write_text(blocks("python")[0])
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    module = importlib.import_module("mine")
    module.main()
    return module


def test_the_script_and_the_commands_of_the_page_run(
    mine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    scores = {(score.model, score.steps) for score in read_scores(runs / "shapes_4_steps" / "eval.json")}
    assert {("shapes_4_steps", steps) for steps in (1, 2, 4)} <= scores
    page = (runs / "shapes_4_steps" / "report.html").read_text()
    assert "fd_shapes_reference" in page
    assert "<img" in page
    assert {score.steps for score in read_scores(runs / "shapes" / "eval.json")} == {4, 32}
    saved = json.loads((runs / "shapes_4_steps" / "student" / "config.json").read_text())
    assert saved["backbone"] == {"name": "small_net", "width": 8}
    with Image.open(tmp_path / "shapes.png") as grid:
        assert grid.size > (160, 48)
    commands = [shlex.split(line) for line in blocks("bash")[0].splitlines()]
    assert [command[0] for command in commands] == ["fewstep", "fewstep"]
    for command in commands:
        succeeds(*command[1:])
    assert (tmp_path / "grid.png").is_file()


def test_a_trained_network_of_ones_own_is_distilled(mine: ModuleType) -> None:
    weights = fewstep.load("runs/shapes", "cpu").denoiser.backbone
    torch.save(weights.state_dict(), "weights.pt")
    stage = {
        "steps": 1,
        "objective": {"name": "tdm", "steps": 2},
        "roles": {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}},
    }
    names = {**vars(mine), "distillation": fewstep.Config(out="runs/own", batch=4, stages=[stage])}
    exec(blocks("python")[1], names)
    assert isinstance(fewstep.load("runs/own", "cpu").denoiser.backbone, mine.Net)


def test_the_images_of_the_page_are_what_it_says(mine: ModuleType) -> None:
    """Discs, squares and crosses: of equal radius a square covers more than a disc, and a disc more than a cross."""
    pixels, labels = mine.draw(600)
    assert pixels.shape == (600, 16, 16)
    disc, square, cross = (pixels[labels == label].mean() for label in range(3))
    assert square > 1.1 * disc > 1.2 * cross > 20


def test_without_the_import_the_run_is_refused(mine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(UserError, match="small_net"):
        fewstep.load("runs/shapes_4_steps", "cpu")
