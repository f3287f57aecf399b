"""What a spawned process runs. Spawning imports it by name, which is impossible for a test file."""

from __future__ import annotations

from pathlib import Path

import torch
from worlds import state_of, tiny_config

from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.processes import World
from fewstep.distill.trainer import Trainer

CPU = torch.device("cpu")


def one_of_several(rank: int, world: int, folder: str, port: int, steps: int) -> None:
    """Trains as one of ``world`` processes on gloo; rank 0 saves the state."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    raw = tiny_config(Path(folder), out=f"{folder}/two", batch=4, accumulate=2)
    raw["stages"][0]["steps"] = steps  # type: ignore[index]
    config = parse_config(raw, "test")
    trainer = Trainer(config, build_inputs(config, CPU), CPU, World(rank, world))
    for step in range(steps):
        trainer.loop.step(step)
    if rank == 0:
        torch.save(state_of(trainer), f"{folder}/two.pt")
    torch.distributed.destroy_process_group()
