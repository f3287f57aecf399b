"""Nothing that training computes changes unnoticed. If it is meant to change, write the file again and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pinned_losses import FILE, case_id, losses
from tiny_runs import CASES

PINNED = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("objective", "changes"), CASES, ids=[case_id(*case) for case in CASES])
def test_the_first_steps_are_those_of_the_file(objective: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pinned, found = PINNED[case_id(objective, changes)], losses(objective, changes, tmp_path)
    for step, (before, now) in enumerate(zip(pinned, found, strict=True)):
        assert now == pytest.approx(before, rel=3e-4, abs=1e-5), f"step {step}"
