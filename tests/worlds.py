"""Small exact problems for the tests: Gaussian teachers, an affine student with known samples, tiny networks."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.idx_files import IDX_FILES
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.checkpoint import role_tensors
from fewstep.distill.data.batch import Batch
from fewstep.distill.objectives import OBJECTIVES
from fewstep.distill.roles import Role, Roles
from fewstep.distill.stage import StageContext
from fewstep.distill.trainer import Trainer
from fewstep.distill.update import Objective
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model
from fewstep.models.schedules import NoiseSchedule, RectifiedFlow, VPLinear
from fewstep.samplers.predictor import Predictor

FLOW = RectifiedFlow()


def gaussian(mean: float, std: float, dimensions: int) -> Denoiser:
    """The exact denoiser of N(mean, std^2 I): a teacher, or the perfect fake score of a Gaussian student."""
    return Denoiser(MixtureBackbone(GaussianMixture.single(mean, std, dimensions), FLOW), FLOW, "x0")


VP = VPLinear()
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6])
NOISE = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOW, HIGH = -1.5, 3.0  # log-SNRs between which solvers are compared


def mixture(schedule: NoiseSchedule = VP) -> Predictor:
    """The exact model of a mixture in the plane."""
    return Predictor(Denoiser(MixtureBackbone(MIXTURE, schedule), schedule, "x0"), Condition())


def by_log_snr(schedule: NoiseSchedule, steps: int, low: float = LOW, high: float = HIGH) -> list[float]:
    """Times uniform in log-SNR."""
    return schedule.time_of_log_snr(torch.linspace(low, high, steps + 1, dtype=torch.float64)).tolist()


class Affine(nn.Module):
    """A student that maps noise z to ``mu + rho z`` in one step, and ignores the time."""

    def __init__(self, mu: float, rho: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu))
        self.rho = nn.Parameter(torch.tensor(rho))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.mu + self.rho * x_t


class Mlp(nn.Module):
    """A tiny network on vectors [B, D], conditioned on the time."""

    def __init__(self, dimensions: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimensions + 2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = t.to(x_t)[:, None]
        return self.layers(torch.cat([x_t, time, time.square()], 1))


def mlp(dimensions: int, seed: int) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(Mlp(dimensions), FLOW, "velocity")


class Points:
    """A source without data: unconditional samples of D numbers."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        return Batch(size, (self.dimensions,), Condition())


def trained(module: nn.Module, lr: float = 1e-3, ema_decay: float = 0.0) -> Role:
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return Role(module, optimizer, ema_decay=ema_decay)


def mlp_roles(dimensions: int = 2, ema_decay: float = 0.0) -> Roles:
    """A Gaussian teacher with an MLP student and fake."""
    return Roles(
        {
            "teacher": Role(gaussian(0.5, 0.8, dimensions)),
            "student": trained(mlp(dimensions, 1), ema_decay=ema_decay),
            "fake": trained(mlp(dimensions, 2)),
        }
    )


def build_objective(name: str, roles: Roles, **settings: object) -> Objective:
    """An objective by name, in a stage of its own."""
    return OBJECTIVES.resolve(name)(**settings).build(roles, StageContext(number=0, first_step=0, steps=1))


def tiny_teacher(folder: Path, seed: int = 0) -> Path:
    """A random, very small image model on disk: 8 x 8 grey, ten classes."""
    config = ModelConfig(
        backbone={"name": "unet", "widths": [8, 16], "blocks": [1, 1], "embedding": 16, "heads": 2},
        shape=(1, 8, 8),
        classes=10,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = config.build()
        for parameter in model.parameters():  # the zero-initialised layers too
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_model(model, config, folder)
    return folder


def tiny_config(folder: Path, **changes: object) -> dict[str, object]:
    """A short TDM run on ``tiny_teacher``, as raw settings."""
    teacher = folder / "teacher"
    if not teacher.exists():
        tiny_teacher(teacher)
    return {
        "out": str(folder / "run"),
        "teacher": str(teacher),
        "batch": 8,
        "log_every": 1,
        "checkpoint": {"every": 4, "keep": 9},
        "stages": [
            {
                "steps": 12,
                "objective": {"name": "tdm", "steps": 2},
                "roles": {"student": {"lr": 1e-3, "ema": 0.9}, "fake": {"lr": 1e-3}},
            }
        ],
        **changes,
    }


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors that training changed: weights, averages, moments."""
    tensors: dict[str, Tensor] = {}
    for name in ("student", "fake"):
        tensors |= role_tensors(name, trainer.roles[name])
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_idx(folder: Path, images: Tensor, labels: Tensor, split: str) -> None:
    """Images, uint8 [N, H, W], and labels, uint8 [N], as the two files of a split."""
    for name, values in zip(IDX_FILES[split], (images, labels), strict=True):
        head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (folder / name).write_bytes(head + values.numpy().tobytes())
