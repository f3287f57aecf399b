"""Paths in configs: a home folder by ``~``, and names of configs that ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from worlds import tiny_config

from fewstep.cli.main import _without_tilde
from fewstep.core.errors import UserError
from fewstep.distill.config_files import find_config, parse_config


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = tiny_config(tmp_path) | {"out": "~/run", "validation": {"reference": "~/reference"}}
    config = parse_config(raw, "test")
    assert config.out == f"{tmp_path}/run"
    assert config.validation.reference == f"{tmp_path}/reference"
    assert _without_tilde("--out=~/grid.png") == f"--out={tmp_path}/grid.png"
    for argument in ("--prompt=a ~ b", "a=~b", "~/x", "--prompt"):
        assert _without_tilde(argument) == os.fspath(argument)


def test_a_misspelt_ending_does_not_find_another_config() -> None:
    assert find_config("configs/fashion/demo").samefile(find_config("configs/fashion/demo.yaml"))
    for name in ("configs/fashion/demo.yam", "configs/fashion/demo.yml", "fashion/demo.2"):
        with pytest.raises(UserError, match=r"No config file .*did you mean"):
            find_config(name)
