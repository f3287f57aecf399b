"""Reads damaged files with every reader, counts them and writes the counts: ``python benchmarks/fuzz.py``.

Stops at the first reader that ends in another exception than ``UserError``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from damaged_files import fuzz  # noqa: E402
from file_readers import READERS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3_000, help="for each reader; a fiftieth for slow ones")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "faults" / "fuzz.json")
    arguments = parser.parse_args()
    counts, started = {}, time.monotonic()
    for name, reader in READERS.items():
        with tempfile.TemporaryDirectory() as folder:
            counts[name] = asdict(fuzz(reader, Path(folder), arguments.inputs))
        print(f"{name}: {counts[name]}", flush=True)
    total = sum(own["inputs"] for own in counts.values())
    print(f"{total:,} inputs in {time.monotonic() - started:.0f} s")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"inputs": total, "readers": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
