"""The prompts whose images a report compares are those of the run's data, whatever its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.api.report import _training_prompts
from fewstep.core.errors import UserError
from fewstep.core.files import write_tensors
from fewstep.distill.config import DataConfig

CAPTIONS = ["a red fox", "a blue fox", "a green bee"]


def prompts(kind: str, path: Path | None) -> list[str]:
    given = None if path is None else str(path)
    return _training_prompts(DataConfig().model_dump() | {"kind": kind, "path": given})


def test_all_captions_of_stored_samples_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "pairs.safetensors"
    write_tensors({"noise": torch.zeros(3, 1)}, file, {"captions": json.dumps(CAPTIONS)})
    assert prompts("tensors", file) == CAPTIONS


def test_the_prompts_of_a_folder_or_a_file_are_all_its_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    assert prompts("prompts", tmp_path) == prompts("prompts", tmp_path / "prompts.txt") == CAPTIONS


def test_prompts_of_an_own_source_are_not_known() -> None:
    with pytest.raises(UserError, match=r"data\.kind=mine are not known: use fewstep sample with --prompts"):
        prompts("mine", None)
