"""A pipeline whose model_index.json is JSON, and not an index of components."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.skeleton import skeleton

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ["diffusers"]}, r"unet must be a library and a class, or two nulls, got \['diffusers'\]"),
        ({"unet": ["diffusers", None]}, "unet must be a library and a class"),
        ({"vae": ["diffusers", 3]}, "vae must be a library and a class"),
        ({"tokenizer": []}, "tokenizer must be a library and a class"),
        ({"unet": [None, None]}, "has no unet, the network"), ({"unet": 3}, "has no unet, the network"),
        ({"_class_name": ["a", "b"]}, "not supported"), ({"_class_name": None}, "not supported"),
    ],
)  # fmt: skip
def test_the_file_and_the_component_are_named(
    saved: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    index = json.loads((saved("sd") / "model_index.json").read_text()) | changes
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "vae"):
        (tmp_path / part).symlink_to(saved("sd") / part)
    with pytest.raises(UserError, match=message):
        PipelineFolder.open(tmp_path)
    with pytest.raises(UserError, match=message):
        skeleton(str(tmp_path), (16, 16, 1), torch.float32)


def test_an_index_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('["diffusers"]')
    with pytest.raises(UserError, match=r"model_index\.json must contain a JSON object, not a list"):
        PipelineFolder.open(tmp_path)
