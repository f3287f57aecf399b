"""The losses and gradient norms of the first steps of every objective, as one version of this code computed them.

`PYTHONPATH=tests python tests/pinned_losses.py` writes them to pinned_losses.json. Other tests show that the equations
are right; these numbers show that nothing else has changed: a random stream, a default, the order of updates.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_runs import CASES, settings

from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.metrics_logger import to_numbers
from fewstep.distill.trainer import Trainer

FILE = Path(__file__).with_suffix(".json")
CPU = torch.device("cpu")


def case_id(objective: str, changes: dict[str, Any]) -> str:
    return " ".join([objective, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


def losses(objective: str, changes: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """The metrics of four steps, in two micro-batches each."""
    torch.manual_seed(0)
    config = parse_config(settings(objective, folder, "cpu", "float32", **changes) | {"accumulate": 2}, "test")
    trainer = Trainer(config, build_inputs(config, CPU), CPU)
    return [to_numbers(trainer.loop.step(step)) for step in range(4)]


def write() -> None:
    """Replaces the file."""
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case_id(*case)] = losses(*case, Path(folder))
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
