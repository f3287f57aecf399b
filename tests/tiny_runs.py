"""A tiny run of every objective, as raw settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from worlds import tiny_config, write_idx

import fewstep
from fewstep.api.data import make_ode_pairs
from fewstep.core.files import write_tensors
from fewstep.distill.objectives import OBJECTIVES

MODEL = {"backbone": {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8}, "shape": [1, 8, 8], "classes": 10}
CASES: list[tuple[str, dict[str, Any]]] = [  # every objective, and the options that change what it computes
    *((name, {}) for name in OBJECTIVES.names()),
    ("dmd2", {"gan": {"weight": 1.0, "critic_weight": 1.0}, "critic_updates": 1}),
    ("tdm", {"critic": "importance", "huber": 0.0}),
    ("decoupled_dmd", {"normaliser": "separate"}),
    ("f_distill", {"divergence": "neyman", "gan_weight": 0.1, "critic_updates": 1, "steps": 3}),
    ("f_distill", {"divergence": "jensen_shannon", "critic_updates": 1, "decay": 0.5}),
]


def settings(objective: str, folder: Path, device: str, precision: str, **changes: object) -> dict[str, Any]:
    """Three steps of an objective: on real images and a new network where it needs them, else data-free."""
    needed = OBJECTIVES.resolve(objective)(**changes)
    raw: dict[str, Any] = tiny_config(folder, device=device, precision=precision)
    roles: dict[str, Any] = {role: {"lr": 1e-3} for role in needed.needs - {"teacher"}}
    raw["stages"] = [{"steps": 3, "objective": {"name": objective, **changes}, "roles": roles}]
    if "discriminator" in roles:
        roles["discriminator"]["init"] = "new"
    if "reference" in needed.needs:
        raw["stages"][0]["freeze"] = {"reference": "teacher"}
        roles.pop("reference")
        generator = torch.Generator().manual_seed(0)  # the run of each device trains on the same pairs
        tensors = {name: torch.randn(40, 1, 8, 8, generator=generator) for name in sorted(needed.tensors)}
        write_tensors(tensors | {"labels": torch.arange(40) % 10}, folder / "samples.safetensors")
        raw["data"] = {"kind": "tensors", "path": str(folder / "samples.safetensors")}
    elif "noise" in needed.tensors:
        sampling = fewstep.SamplingConfig("heun", 2)
        make_ode_pairs(folder / "teacher", folder / "pairs.safetensors", n=40, sampling=sampling, device="cpu")
        raw["data"] = {"kind": "tensors", "path": str(folder / "pairs.safetensors")}
    elif "x0" in needed.tensors:
        pixels = torch.randint(0, 256, (40, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        write_idx(folder, pixels, (torch.arange(40) % 10).to(torch.uint8), "train")
        raw["data"] = {"kind": "idx", "path": str(folder)}
    if needed.needs == {"student"}:
        raw |= {"teacher": None, "model": MODEL}
        roles["student"]["init"] = "model"
    return raw
