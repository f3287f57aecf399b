"""What a spawned process runs. Spawning imports it by name, which is impossible for a test file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.sharding import whole

CPU = torch.device("cpu")
Runs = Mapping[str, Mapping[str, Any]]  # raw settings by name


def train_to(step: int, runs: Runs, world: World = SINGLE_PROCESS) -> dict[str, dict[str, Tensor]]:
    """Trains runs up to a step, new ones or from their checkpoints, and writes a checkpoint; returns their states.

    SGD replaces AdamW, which turns the rounding of a gradient that should be zero into a step of the learning rate.
    """
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # type: ignore[misc, assignment]
    states = {}
    try:
        for name, raw in runs.items():
            config = parse_config(dict(raw), name)
            inputs = build_inputs(config, CPU, world=world)
            new = not (Path(str(config.out)) / "checkpoints").exists()
            opened = RunFolder.create if new else RunFolder.reopen
            run = opened(config if new else config.out, CPU, world, inputs)  # type: ignore[operator]
            run.trainer.advance(step)
            run.on_checkpoint(run.trainer)
            states[name] = {key: value.clone() for key, value in whole(run.trainer.state()[0], keep=True).items()}
    finally:
        torch.optim.AdamW = adamw  # type: ignore[misc]
    return states


def _one(rank: int, size: int, port: int, step: int, runs: Runs, results: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    states = train_to(step, runs, World(rank, size, None, init_device_mesh("cpu", (size,))))
    if rank == 0:
        torch.save(states, results)
    torch.distributed.destroy_process_group()


def train_on(size: int, step: int, runs: Runs, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The same on several gloo processes."""
    port = 20_000 + (os.getpid() * 31 + step) % 20_000
    results = folder / f"states-{size}-{step}.pt"
    torch.multiprocessing.spawn(_one, args=(size, port, step, runs, str(results)), nprocs=size)
    return torch.load(results, weights_only=True)  # type: ignore[no-any-return]


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], kinds: Sequence[str]) -> float:
    """Between tensors of these kinds (``weights``, ``average``)."""
    names = [name for name in theirs if any(f"/{kind}/" in name for kind in kinds)]
    assert names
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in names)
