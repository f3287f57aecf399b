"""Compares training on 2, then 1, then 4 processes with one process: ``python benchmarks/processes.py``.

Every method of a small network on the CPU, copies and adapters, with whole networks and with networks split over the
processes (``shard: true``); writes results/processes.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from several_processes import CASES, differences  # noqa: E402

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = differences(Path(folder), list(CASES))
    (ROOT / "results" / "processes.json").write_text(json.dumps({"differences": found}, indent=1) + "\n")
    for one in found:
        print(*one.values(), sep="\t")
