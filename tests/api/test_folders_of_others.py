"""Folders that are damaged, come from somebody else, or are named in an unusual way."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds import tiny_config

import fewstep
from fewstep.api import evaluate, models
from fewstep.api.export import _objective
from fewstep.api.report import compare_images
from fewstep.core.errors import UserError
from fewstep.core.files import require_empty
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import run_config


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw: dict[str, Any] = tiny_config(tmp_path_factory.mktemp("runs"), checkpoint={"every": 1})
    raw["stages"][0]["steps"] = 1
    return fewstep.train(parse_config(raw, "test"), progress=False)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


WRONG = [
    ("teacher", 5), ("teacher", ["fashion"]), ("size", 5), ("size", [64, 64]), ("size", ["64", "64", "1"]),
    ("data", [1]), ("data", {"kind": ["folder"]}), ("data", {"path": 5}), ("stages", 5), ("stages", [3]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_setting_of_a_wrong_type_is_named(run: Path, key: str, value: object) -> None:
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {key: value}))
    known = partial(evaluate.known_teacher_scores, hashes=set())
    for use in (compare_images, models.teacher_of_run, run_config, known):
        with pytest.raises(UserError, match=rf"config\.yaml.*{key}"):
            use(run)


def test_a_config_without_data_or_objectives_still_shows_a_run(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["data"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert compare_images(run, "cpu", columns=2).is_file()
    assert [_objective(value) for value in ("tdm", {"name": "dmd"})] == ["tdm", "dmd"]
    assert [_objective(value) for value in ({}, None, {"name": 3})] == [None] * 3


def test_a_model_with_some_config_yaml_is_a_model(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original.parent / "teacher", tmp_path / "model")
    (folder / "config.yaml").write_text("name: mine\n")
    assert models.load(folder, "cpu").path == folder
    assert models.run_of(folder) is None
    assert evaluate._default_json(folder) is None


def test_a_checkpoint_and_a_run_are_found_from_inside(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert models.name_of("step-0000001") == "run, step 1"
    monkeypatch.chdir(run)
    assert models.name_of(".") == "run"
    assert models.name_of("owner/name") == "name"


def test_a_finished_run_without_checkpoints_is_not_trained_again(run: Path) -> None:
    """Somebody may have deleted them to save space."""
    shutil.rmtree(run / "checkpoints")
    log = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="has a student but no checkpoint"):
        fewstep.train(resume=run, progress=False)
    assert (run / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize("name", [".", "..", ""])
def test_a_folder_without_a_name_is_no_place_for_a_result(name: str) -> None:
    with pytest.raises(UserError, match="name a new folder"):
        require_empty(Path(name))
