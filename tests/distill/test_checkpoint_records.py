"""A checkpoint whose record has a valid hash, and not the keys that this version reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.distill import checkpoint
from fewstep.distill.checkpoint import read_checkpoint, read_newest, write_checkpoint


def write_state(folder: Path, changes: dict[str, Any]) -> None:
    """Writes the state of a checkpoint with ``changes``, None removes a key, and the hash that belongs to it."""
    file = folder / "state.json"
    state = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(state | {"record_sha256": checkpoint._hash(state)}))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (None, "it has no 'parts'"), (3, "parts: 'int' object is not iterable"), ("ab", "parts: string indices"),
        ([{"file": "state.safetensors", "rows": {}}], "it has no 'sha256'"),
        ([{"file": 3, "sha256": "", "rows": {}}], "parts: "), ([{"file": "a", "sha256": "", "rows": []}], "parts: "),
        ([{"file": "a", "sha256": "", "rows": {"x": "y"}}], "parts: invalid literal"),
        ([{"file": "../a", "sha256": "", "rows": {}}], "parts: Invalid name"),
    ],
)  # fmt: skip
def test_a_record_without_its_files_is_refused_and_an_older_one_is_read(
    tmp_path: Path, parts: Any, reason: str
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, {"a": torch.zeros(2)}, {}, keep=2)
    last = tmp_path / "step-0000002"
    write_state(last, {"parts": parts})
    for verify in (True, False):
        with pytest.raises(UserError, match=rf"state.json does not list the files of a checkpoint: {reason}"):
            read_checkpoint(last, verify=verify)
    path, _, state, damaged = read_newest(tmp_path)
    assert (path.name, state["step"], len(damaged)) == ("step-0000001", 1, 1)
