"""A checkpoint whose record has a valid hash, and not the keys that this version reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.distill import checkpoint
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, read_newest, write_checkpoint
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder


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


@pytest.mark.parametrize("step", [1, 99, 2.5, "2", None])
def test_a_checkpoint_under_another_name_than_its_step_is_damaged(tmp_path: Path, step: Any) -> None:
    """Training would continue from it again and again: its next checkpoints would count as older."""
    for number in (1, 2):
        write_checkpoint(tmp_path, number, {"a": torch.zeros(2)}, {}, keep=2)
    write_state(tmp_path / "step-0000002", {"step": step})
    path, _, state, damaged = read_newest(tmp_path)
    assert (path.name, state["step"]) == ("step-0000001", 1)
    assert f"its state.json is of step {step}" in damaged[0]


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    run = RunFolder.create(parse_config(tiny_config(tmp_path_factory.mktemp("run")), "test"), torch.device("cpu"))
    run.train()
    return checkpoints(run.folder / "checkpoints")[-1]


def refused(last: Path, tensors: dict[str, Tensor], state: dict[str, Any], reason: str) -> None:
    """Resuming from this instead of the last checkpoint is refused in words, before a step."""
    stored, record = read_checkpoint(last)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    own = {key: value for key, value in record.items() if key not in ("parts", "record_sha256")}
    try:
        write_checkpoint(last.parent, record["step"], tensors, own | state, keep=9)
        with pytest.raises(UserError, match=reason):
            RunFolder.reopen(last.parents[1], torch.device("cpu"))
    finally:
        write_checkpoint(last.parent, record["step"], before, own, keep=9)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"seconds": "x"}, "seconds: "), ({"seconds": None}, "seconds: "), ({"evaluations": None}, "evaluations: "),
        ({"stage": -1}, "stage: "), ({"best": [1]}, "best: "), ({"best": {"value": "low", "step": 4}}, "best.value: "),
        ({"best": {"value": 3.0}}, "best.step: "),
    ],
)  # fmt: skip
def test_a_counter_of_another_type_is_refused_before_training(last: Path, changed: Any, reason: str) -> None:
    refused(last, dict(read_checkpoint(last)[0]), changed, rf"state.json does not fit this run: {reason}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda moment: None, "has no '.*/optimizer/exp_avg/.*'"), (lambda moment: torch.tensor(1.0), r"is \[\] in"),
        (lambda moment: torch.zeros(7, 1), r"is \[7, 1\] in"), (lambda moment: moment.int(), "is torch.int32 in"),
        (lambda moment: moment.double(), "is torch.float64 in"),
    ],
)  # fmt: skip
def test_a_moment_that_the_optimizer_cannot_use_is_refused_before_training(
    last: Path, change: Callable[[Tensor], Tensor | None], reason: str
) -> None:
    stored = {name: tensor.clone() for name, tensor in read_checkpoint(last)[0].items()}
    name = next(name for name in stored if "/optimizer/exp_avg/" in name)
    changed = change(stored.pop(name))
    refused(last, stored if changed is None else stored | {name: changed}, {}, reason)
