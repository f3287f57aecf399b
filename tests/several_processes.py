"""Training on several processes, compared with one that accumulates.

What spawned processes run must be in a module that they can import by name, which a test file is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_runs import settings
from torch import Tensor

from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.sharding import whole

CPU = torch.device("cpu")
Runs = Mapping[Any, Mapping[str, Any]]  # raw settings by name


def train_to(step: int, runs: Runs, world: World = SINGLE_PROCESS) -> dict[Any, dict[str, Tensor]]:
    """Trains runs up to a step, new ones or from their checkpoints, and writes a checkpoint; returns their states.

    SGD replaces AdamW, which turns the rounding of a gradient that should be zero into a step of the learning rate.
    """
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # type: ignore[misc, assignment]
    states = {}
    try:
        for name, raw in runs.items():
            config = parse_config(dict(raw), str(name))
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


def train_on(size: int, step: int, runs: Runs, folder: Path) -> dict[Any, dict[str, Tensor]]:
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


# --- the comparison ---------------------------------------------------------------------------------------------------

STEPS = 20
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tdm": ("tdm", {"guidance": 2.0}, {}),
    "tdm, adapters": ("tdm", {"guidance": 2.0}, {"adapters": {"rank": 2}}),
    "dmd2 with a GAN on the fake": ("dmd2", {"gan": {"weight": 1.0, "critic_weight": 1.0}, "critic_updates": 2}, {}),
    "cdm": ("cdm", {"max_steps": 6, "blend": 0.01}, {}),
    "f_distill": ("f_distill", {"gan_weight": 0.1, "critic_updates": 1, "steps": 3}, {}),
    "phased_dmd": ("phased_dmd", {"phase": 1}, {}),
    "tdm, small student beside adapters": (
        "tdm",
        {"guidance": 2.0},
        {"adapters": {"rank": 2}, "networks": {"small": {"backbone": {"widths": [8], "blocks": [1]}}}},
    ),
}


def runs(folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    """The raw settings of these cases."""
    made = {}
    for name in names:
        objective, options, changes = CASES[name]
        place = folder / name
        place.mkdir()
        raw = settings(objective, place, "cpu", "float32", **options)
        raw |= {"batch": 2, "accumulate": 4, "health": {"every": 0}}
        for role in raw["stages"][0]["roles"].values():
            role |= {"lr": 0.02, "ema": 0.9}
        raw["stages"][0]["steps"] = STEPS
        if "networks" in changes:
            raw["stages"][0]["roles"]["student"] |= {"init": "small", "full_finetune": True}
        made[name] = raw | changes | {"out": str(place / "run")}
    return made


def differences(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """20 steps on 2, then 1, then 4 processes against 20 on one, each with 4 micro-batches of 2 in all, with whole and
    with split networks: by how much weights and averages differ at most, and by how much the weights moved."""
    one = runs(folder, *names)
    several = {
        (name, networks): raw | {"out": f"{raw['out']}, {networks}", "shard": networks == "split"}
        for name, raw in one.items()
        for networks in ("whole", "split")
    }
    expected = train_to(STEPS, one)
    train_on(2, 7, several, folder)
    train_to(13, several)
    reached = train_on(4, STEPS, several, folder)
    start = train_to(0, {name: raw | {"out": raw["out"] + ", start"} for name, raw in one.items()})
    return [
        {
            "method": name,
            "networks": networks,
            "largest difference": largest_difference(state, expected[name], ["weights", "average"]),
            "weights moved by": largest_difference(start[name], expected[name], ["weights"]),
        }
        for (name, networks), state in reached.items()
    ]
