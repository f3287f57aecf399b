"""Memory and the cost of records over a long run of a tiny network: what grows with the number of steps?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from worlds import Points, mlp

from fewstep.distill import run_folder
from fewstep.distill.build import build_inputs
from fewstep.distill.callback import Callback
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.trainer import Trainer

STEPS, ENDS, EVERY = 5_000, 500, 10
CPU = torch.device("cpu")


class Memory(Callback):
    """The resident memory of this process in MiB after each step."""

    def __init__(self) -> None:
        self.mib: list[float] = []

    def on_step(self, trainer: Trainer) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.mib.append(pages * 4096 / 2**20)


def measure_long_run(inputs: Path, folder: Path) -> dict[str, Any]:
    """Medians over the first and over the last ``ENDS`` steps of a run of ``STEPS`` steps that logs every step and
    writes a checkpoint every ``EVERY`` steps."""
    roles = {"student": {"lr": 1e-4, "ema": 0.9}, "fake": {"lr": 1e-4}}
    objective = {"name": "dmd2", "guidance": 1.0, "critic_updates": 1}
    config = parse_config({
        "out": str(folder / "long"), "batch": 8, "log_every": 1, "health": {"every": 0},
        "checkpoint": {"every": EVERY, "keep": 2},
        "stages": [{"steps": STEPS, "objective": objective, "roles": roles}],
    }, "long run")  # fmt: skip
    run = RunFolder.create(config, CPU, inputs=build_inputs(config, CPU, mlp(4, seed=0), Points(4)))
    memory = Memory()
    with (
        _timed(run_folder, "append_line") as lines,
        _timed(run_folder, "write_checkpoint") as checkpoints,
        _timed(Trainer, "one_step") as steps,
    ):
        started = time.monotonic()
        run.train(callbacks=[memory])
        seconds = time.monotonic() - started
    few = ENDS // EVERY
    return {
        "steps": STEPS, "steps_compared": ENDS, "seconds": round(seconds),
        "memory_mib": _ends(memory.mib, ENDS, 1),
        "step_milliseconds": _ends([1e3 * s for s in steps], ENDS, 2),
        "line_microseconds": _ends([1e6 * s for s in lines], ENDS, 0),
        "checkpoint_milliseconds": _ends([1e3 * s for s in checkpoints], few, 2),
    }  # fmt: skip


def _ends(values: list[float], count: int, digits: int) -> dict[str, float]:
    first, last = statistics.median(values[:count]), statistics.median(values[-count:])
    return {"first": round(first, digits), "last": round(last, digits)}


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """The processor's seconds of every call of a function, which do not depend on other programs."""
    seconds: list[float] = []
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **settings: Any) -> Any:
        started = time.process_time()
        try:
            return function(*arguments, **settings)
        finally:
            seconds.append(time.process_time() - started)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, function)
