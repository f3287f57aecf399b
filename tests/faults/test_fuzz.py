"""Whatever is in a file, reading it succeeds or ends in a ``UserError``, never in another exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damaged_files import fuzz
from file_readers import READERS

RESULTS = Path(__file__).parents[2] / "results" / "faults" / "fuzz.json"
EXAMPLES = 50
SLOW_EXAMPLES = 3_000  # more than 100,000 inputs for all readers; benchmarks/fuzz.py counts them


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    counts = fuzz(READERS[name], tmp_path, EXAMPLES)
    assert counts.inputs == counts.read + counts.refused >= (1 if READERS[name].slow else EXAMPLES)
    assert counts.refused > EXAMPLES // 10 or name.startswith(("report", "JSON lines"))  # these skip what is damaged


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz(READERS[name], tmp_path, SLOW_EXAMPLES)


def test_the_committed_counts_are_of_all_readers() -> None:
    counts = json.loads(RESULTS.read_text())["readers"]
    assert counts.keys() == READERS.keys()
    assert sum(own["inputs"] for own in counts.values()) >= 10_000
    assert all(own["inputs"] == own["read"] + own["refused"] for own in counts.values())
