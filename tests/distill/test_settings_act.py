"""A setting acts, or is refused, or a note says that it does nothing here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import tiny_config

import fewstep
from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config


def test_weights_of_a_model_that_is_no_pipeline_are_not_changed_without_a_word(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path, weights="bfloat16"), "test")
    with pytest.raises(UserError, match="weights: bfloat16 does not act"):
        build_inputs(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"shard": True}, "shard: true has no effect in one process."),
        ({"offload": True}, "offload: true has no effect on a CPU."),
        ({}, None),
    ],
)
def test_what_acts_on_other_machines_alone_is_noted(changes: dict[str, Any], note: str | None, tmp_path: Path) -> None:
    inputs = build_inputs(parse_config(tiny_config(tmp_path, **changes), "test"), torch.device("cpu"))
    assert list(inputs.notes) == ([note] if note else [])


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({}, "the health check and validation"),
        ({"health": {"every": 0}}, "validation"),
        ({"validation": {"every": 0}}, "the health check"),
        ({"health": {"every": 0}, "validation": {"every": 0}}, None),
    ],
)
def test_only_what_is_due_is_tried_before_the_first_step(
    changes: dict[str, Any], tried: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    due = {"health": {"every": 2}, "validation": {"every": 2, "n": 20, "reference": "fashion"}}
    raw = tiny_config(tmp_path, **(due | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.api.train._validation", lambda *_: None)
        fewstep.train(parse_config(raw, "test"))
    said = [line for line in capsys.readouterr().out.splitlines() if "trying" in line]
    assert said == ([f"Before the first step: trying {tried}."] if tried else [])
