"""The page "Your own images": its commands run in its order, with its configs, on a folder like its own."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import succeeds
from PIL import Image

from fewstep.core.image_data import ImageData, open_images
from fewstep.core.tables import read_texts
from fewstep.eval.score_files import read_scores

WHOLE = (Path(__file__).parents[1] / "docs" / "own_data.md").read_text(encoding="utf-8")
PAGE, PIPELINE = WHOLE.split("### From captions to an exported student")
TINY = ["batch=4", "stages.0.steps=2", "previews.every=2", "device=cpu"]
NETWORK = ["model.backbone.widths=[8, 8]", "model.backbone.blocks=[1, 1]", "model.backbone.patch=8"]


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands(page: str = PAGE) -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("bash", page) for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page begins with: photos of three classes and several sizes, its two configs, a table of captions."""
    numbers = np.random.default_rng(0)
    for number, name in enumerate(("bee", "cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(30):
            pixels = numbers.integers(0, 256, (70 + 10 * number, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k:04d}.jpg")
    teacher, student, words, _ = blocks("yaml")
    (tmp_path / "teacher.yaml").write_text(teacher)
    (tmp_path / "student.yaml").write_text(student)
    (tmp_path / "words.yaml").write_text(words)
    with (tmp_path / "captions.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("title", "caption"), ("shirt", "a red t-shirt, on white"), ("bag", "a green bag")]
        )
    with (tmp_path / "pictures.csv").open("w", newline="") as stream:
        files = [f"photos/cat/{k:04d}.jpg" for k in range(3)]
        captions = ["a red cat", "the cat on red", "a blue cat"]
        csv.writer(stream).writerows([("file_name", "caption"), *zip(files, captions, strict=True)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_runs_in_turn(folder: Path) -> None:
    assert len(commands()) == 16
    for program, *arguments in commands():
        assert program == "fewstep"
        if arguments[0] == "train":
            arguments += TINY + (NETWORK if arguments[1] in ("teacher.yaml", "words.yaml") else [])
            arguments += ["validation.every=2", "validation.n=10"] if "out=runs/photos_scored" in arguments else []
        if arguments[:2] == ["data", "reference"]:
            arguments += ["--epochs", "1"]
        if arguments[0] == "eval":
            arguments[arguments.index("--n") + 1] = "20"
        succeeds(*arguments)
    configs = {run: json.loads((folder / "runs" / run / "student" / "config.json").read_text())
               for run in ("photos", "photos_4_steps", "faces", "faces_4_steps")}  # fmt: skip
    assert configs["photos"]["class_names"] == configs["photos_4_steps"]["class_names"] == ["bee", "cat", "dog"]
    assert configs["faces_4_steps"]["classes"] == 0
    assert len(list((folder / "cats").glob("*.png"))) == 4
    scores = read_scores(folder / "runs" / "photos_scored" / "eval.json")
    assert {score.steps for score in scores} == {2, 4}
    assert {"fd_photos_reference", "accuracy"} <= {score.metric for score in scores}
    assert "fd_photos_reference" in (folder / "runs" / "photos_scored" / "report.html").read_text()
    for name in ("grid.png", "teacher.png", "faces.png"):
        with Image.open(folder / name) as grid:
            assert min(grid.size) > 64
    assert read_texts(folder / "runs" / "captions" / "prompts.txt") == ["a red t-shirt, on white", "a green bag"]
    assert read_texts(folder / "runs" / "titles" / "prompts.txt") == ["shirt", "bag"]


def test_the_expression_of_the_page_opens_the_images(folder: Path) -> None:
    (expression,) = re.findall(r"`(open_images\(.*?\))` of", PAGE)
    table = eval(expression, {"open_images": open_images, "ImageData": ImageData})
    assert (len(table), table.class_names, table.shape) == (90, ("bee", "cat", "dog"), (3, 64, 64))


def test_the_walkthrough_of_a_pipeline_runs(folder: Path) -> None:
    for extra in ("diffusers", "peft", "efficientnet_lite_pytorch"):
        pytest.importorskip(extra)
    config, protocol = blocks("yaml", PIPELINE)
    (folder / "pipeline.yaml").write_text(config)
    (folder / "protocol.yaml").write_text(protocol.replace("n: 1000", "n: 4"))
    encode = next(command for command in commands() if command[1:3] == ["data", "encode"])
    assert len(commands(PIPELINE)) == 6
    for program, *arguments in [encode, *commands(PIPELINE)]:
        assert program == "fewstep"
        arguments += [*TINY, "health.every=0"] if arguments[0] == "train" else []
        succeeds(*({"100-599": "100-101", "32": "2"}.get(text, text) for text in arguments))
    run = folder / "runs" / "garments"
    assert sorted(file.name for file in (run / "previews").iterdir())[-1] == "step-0000002.png"
    assert len(list((folder / "images").glob("*.png"))) == 8
    found = {score.steps: score for score in read_scores(run / "eval.json")}
    assert found.keys() == {2, 4}
    assert {score.metric for score in found.values()} == {"fd_efficientnet"}
    assert "fd_efficientnet" in (run / "report.html").read_text()
    names: dict[str, Any] = {}
    exec(blocks("python", PIPELINE)[0], names)
    assert names["image"].size == (32, 32)
    assert names["pipeline"].scheduler.config.num_train_timesteps == 1000
