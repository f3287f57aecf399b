"""What a spawned process runs. Spawning imports it by name, which it cannot do with a test file."""

from __future__ import annotations

from pathlib import Path

import torch
from fewstep.distill.run import Run
from worlds import state_of, tiny_config

from fewstep.distill.config import parse_config
from fewstep.distill.processes import World

CPU = torch.device("cpu")


def one_of_several(rank: int, world: int, folder: str, port: int, steps: int) -> None:
    """One of ``world`` processes on gloo; rank 0 leaves the run's checkpoint behind."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    raw = tiny_config(Path(folder), out=f"{folder}/two", batch=4)
    raw["stages"][0]["steps"] = steps  # type: ignore[index]
    run = Run(parse_config(raw, "test"), Path(folder) / "two", CPU, World(rank, world))
    for step in range(steps):
        run.loop.step(step)
    if rank == 0:
        torch.save(state_of(run), f"{folder}/two.pt")
    torch.distributed.destroy_process_group()
