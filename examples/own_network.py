"""Distils a network of your own, in plain Python: no config file, no run folder.

A small network learns the flow to a ring of eight Gaussians, and a student of it then generates them in two steps.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

import fewstep
from fewstep.distill.data.batch import Batch
from fewstep.distill.objectives.flow_matching import FlowMatching
from fewstep.distill.objectives.tdm import TDM
from fewstep.models.schedules import RectifiedFlow
from fewstep.samplers.generate import generate


class Net(nn.Module):
    """Called as (x_t [B, 2], t [B], condition) -> velocity [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x_t: Tensor, t: Tensor, condition: fewstep.Condition) -> Tensor:
        angle = (math.pi / 2 * t).to(x_t)[:, None]
        return self.layers(torch.cat([x_t, angle.sin(), angle.cos()], 1))


def ring(random, size: int) -> Batch:
    """A source: points of the ring, a function of keyed random numbers."""
    angle = 2 * math.pi / 8 * random.integers(size, 8).float()
    x0 = 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * random.normal((size, 2), "spread")
    return Batch(size, (2,), fewstep.Condition(), {"x0": x0})


def train(objective, roles: dict, steps: int, teacher: fewstep.Denoiser) -> fewstep.Model:
    stage = {"steps": steps, "objective": objective, "roles": roles}
    config = fewstep.Config(stages=[stage], batch=256, health={"every": 0})
    trainer = fewstep.Trainer.create(config, teacher=teacher, data=ring, device="cpu")
    trainer.train()
    return trainer.student


def main(scale: float = 1.0) -> None:
    torch.manual_seed(0)
    network = fewstep.Denoiser(Net(), RectifiedFlow())
    teacher = train(FlowMatching(drop_condition=0), {"student": {"lr": 3e-3}}, int(2000 * scale), network)
    roles = {"student": {"lr": 1e-3, "betas": (0, 0.99)}, "fake": {"lr": 2e-3, "betas": (0, 0.99)}}
    student = train(TDM(steps=2, guidance=1, critic_updates=2), roles, int(1000 * scale), teacher.denoiser)
    x0 = generate(student, fewstep.Condition(), fewstep.SamplingConfig(), numbers=range(1000)).x0
    print(f"mean distance from the ring after 2 evaluations: {(x0.norm(dim=1) - 2).abs().mean():.3f}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
