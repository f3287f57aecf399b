"""Behaviour on mixtures in the plane: which modes each divergence keeps, and several steps on a ring of modes.

``python benchmarks/mixtures.py`` runs everything and writes ``results/mixtures.json``, which docs/results.md shows.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.adversarial import Heads
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.objectives import OBJECTIVES
from fewstep.distill.objectives.f_distill import WEIGHTS, FDistill
from fewstep.distill.roles import Role, Roles
from fewstep.distill.stage import RoleConfig, StageContext, make_role, roles_of_stage
from fewstep.distill.update import Objective
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, routed
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import RectifiedFlow
from fewstep.samplers.generate import integrate
from fewstep.samplers.plan import Plan
from fewstep.samplers.solvers import STUDENT_SOLVERS

RESULTS = Path(__file__).parent.parent / "results" / "mixtures.json"
FLOW = RectifiedFlow()


def points(random: KeyedRandom, size: int) -> Batch:
    """A source without data: it only defines that samples have two numbers."""
    return Batch(size, (2,), Condition())


# --- divergences: a Gaussian student between two modes ----------------------------------------------------------------

TWO = GaussianMixture([0.5, 0.5], [[-1.5, 0.0], [1.5, 0.0]], [0.5, 0.5])


class ExactWithFeatures(nn.Module):
    """The exact denoiser of a mixture, with (x_t, t) as the features of the layer ``inputs``."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.exact = MixtureBackbone(mixture, FLOW)
        self.inputs = nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.inputs(torch.cat([x_t, t.to(x_t)[:, None]], 1))
        return self.exact(x_t, t, condition)


class Ellipse(nn.Module):
    """A one-step student ``mu + rho z`` with a mean and a standard deviation per axis."""

    def __init__(self, mu: tuple[float, float], rho: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu))
        self.rho = nn.Parameter(torch.full((2,), rho))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.mu + self.rho * x_t

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        variance = ((1 - t) * self.rho) ** 2 + t**2
        return -0.5 * ((x_t - (1 - t) * self.mu) ** 2 / variance + (2 * math.pi * variance).log()).sum(1)


class Exact(nn.Module):
    """The exact denoiser of the ellipse's samples: a fake score that is always up to date."""

    def __init__(self, student: Ellipse) -> None:
        super().__init__()
        self.student = [student]  # in a list, so that its parameters do not become this module's

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mu, rho, t = self.student[0].mu.detach(), self.student[0].rho.detach(), t.to(x_t)[:, None]
        return mu + (1 - t) * rho**2 / (((1 - t) * rho) ** 2 + t**2) * (x_t - (1 - t) * mu)


class ExactRatio(nn.Module):
    """A discriminator that returns log p / q exactly."""

    def __init__(self, student: Ellipse) -> None:
        super().__init__()
        self.student = [student]
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        x_t, t = features["inputs"].split([2, 1], 1)
        log_p = TWO.log_density(x_t.detach(), 1 - t[:, 0].double(), t[:, 0].double()).float()
        return (log_p - self.student[0].log_density(x_t, t))[:, None].detach() + 0 * self.unused


def two_modes(random: KeyedRandom, size: int) -> Batch:
    """Real samples, for the discriminator."""
    seed = int(random.integers(1, 2**31, "real"))
    return Batch(size, (2,), Condition(), {"x0": TWO.sample(size, seed).float()})


def lesser_mode(divergence: str, learned: bool, steps: int = 400, seed: int = 0) -> float:
    """The share of the student's samples left of 0 after training from inside the right mode: 0.5 keeps both modes.

    Renoise times end at 0.4: with more noise the two modes merge, and every divergence keeps both.
    """
    student = Ellipse((1.2, 0.0), 0.6)
    heads = Heads({"inputs": 3}) if learned else ExactRatio(student)
    rate = RoleConfig(init="keep", lr=2e-2)
    roles = Roles(
        {
            "teacher": Role(Denoiser(ExactWithFeatures(TWO), FLOW, "x0", feature_layers=("inputs",))),
            "student": make_role(Denoiser(student, FLOW, "x0"), rate),
            "fake": Role(Denoiser(Exact(student), FLOW, "x0")),
            "discriminator": make_role(heads, RoleConfig(init="keep", lr=1e-2)),
        }
    )
    # the fake is exact and the generator has no GAN term: only h(r) differs between divergences
    settings = FDistill(
        divergence=divergence, guidance=1.0, critic_updates=1, gan_weight=0.0, feature_layers=("inputs",),
        renoise_times={"low": 0.02, "high": 0.4},
    )  # fmt: skip
    objective = settings.build(roles, StageContext(0, 0, steps))
    by_name = {update.name: update for update in objective.updates}
    names = ("discriminator", "student") if learned else ("student",)
    objective = Objective(tuple(by_name[name] for name in names), objective.rollout)
    loop = Loop(roles, objective, {"data": two_modes}, 512, seed=seed)
    for step in range(steps):
        loop.step(step)
    mu, rho = student.mu[0].item(), student.rho[0].abs().item()
    return 0.5 * math.erfc(mu / rho / math.sqrt(2))


# --- several steps on a ring ------------------------------------------------------------------------------------------

MODES = 8
RING = GaussianMixture(
    [1.0] * MODES,
    [[math.cos(2 * math.pi * k / MODES), math.sin(2 * math.pi * k / MODES)] for k in range(MODES)],
    [0.05] * MODES,
)


class Net(nn.Module):
    """A small network on the plane, conditioned on the time."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t = t.to(x_t)[:, None]
        return self.layers(torch.cat([x_t, t, t.square(), (3 * t).sin(), (3 * t).cos()], 1))


def pretrained(seed: int, steps: int = 3000) -> Denoiser:
    """A network trained on the ring's velocity, from which student and fake start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = Denoiser(Net(), FLOW, "velocity")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0, noise = RING.sample(512, generator).float(), torch.randn(512, 2, generator=generator)
        t = torch.rand(512, generator=generator, dtype=torch.float64)
        level = t[:, None].float()
        out = denoiser((1 - level) * x0 + level * noise, t, Condition()).raw
        loss = (out - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return denoiser


def ring(method: str, start: Denoiser, seed: int, steps: int = 1500) -> dict[str, float]:
    """The quality of four-step students trained from ``start`` for ``steps`` steps in all: ``phased`` in two phases,
    ``truncated`` with the gradient of one random step of four (the rollout of dmd2)."""
    rate = {"student": RoleConfig(init="start", lr=3e-4), "fake": RoleConfig(init="start", lr=1e-3)}
    shared = {"steps": 4, "guidance": 1.0, "critic_updates": 2}
    phases = {"phased": [{"phase": 1}, {"phase": 2}], "truncated": [{}]}[method]
    config = OBJECTIVES.resolve("phased_dmd" if method == "phased" else "dmd2")
    roles: dict[str, Role] = {"teacher": Role(Denoiser(MixtureBackbone(RING, FLOW), FLOW, "x0")), "start": Role(start)}
    for number, phase in enumerate(phases):
        frozen = {"expert1": "student"} if number else {}
        roles = roles_of_stage(roles, rate, frozen)
        view = Roles(roles)
        length = steps // len(phases)
        objective = config(**shared, **phase).build(view, StageContext(number, number * length, length))
        loop = Loop(view, objective, {"data": points}, 256, seed=seed)
        for step in range(length):
            loop.step(step)
    return quality(view, objective)


def quality(roles: Roles, objective: Objective, n: int = 4000) -> dict[str, float]:
    """The number of modes with at least a fifth of their share of the samples within three standard deviations, the
    share of samples in any mode, and the entropy of the modes' shares relative to that of equal ones."""
    experts = [roles.denoiser(role) for role, _ in objective.experts]
    generator = experts[0] if len(experts) == 1 else routed(experts, [low for _, low in objective.experts])
    few = objective.few_step
    assert few is not None
    plan = Plan(STUDENT_SOLVERS[few.rule], (*few.times, 0.0))
    x = integrate(generator, Condition(), (2,), plan=plan, numbers=range(n), seed=1, batch=n).x0
    distance = torch.cdist(x.double(), RING.means)
    nearest = distance.min(1)
    near = nearest.values < 3 * 0.05 * 1.2
    shares = torch.bincount(nearest.indices[near], minlength=MODES) / n
    p = shares / shares.sum()
    entropy = -(p * p.clamp_min(1e-12).log()).sum().item() / math.log(MODES)
    return {
        "modes": float((shares > 0.2 / MODES).sum()),
        "in_a_mode": near.double().mean().item(),
        "entropy": entropy,
    }


# --- a ring of two classes, for guidance ------------------------------------------------------------------------------

CLASSES = 2


def guided_ring() -> Denoiser:
    """The exact teacher of a ring whose halves are two classes."""
    means = [[math.cos(2 * math.pi * k / MODES), math.sin(2 * math.pi * k / MODES)] for k in range(MODES)]
    labels = [k * CLASSES // MODES for k in range(MODES)]
    mixture = GaussianMixture([1.0] * MODES, means, [0.1] * MODES, labels)
    return Denoiser(MixtureBackbone(mixture, FLOW), FLOW, "x0")


class Labelled(nn.Module):
    """``Net`` with an embedding of the class."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES + 1, 16)
        self.layers = nn.Sequential(
            nn.Linear(22, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t = t.to(x_t)[:, None]
        label = self.embedding(condition["labels"])
        return self.layers(torch.cat([x_t, t, t.square(), (3 * t).sin(), (3 * t).cos(), label], 1))


@functools.cache
def _guided_weights(steps: int = 1500) -> Denoiser:
    mixture = guided_ring().backbone.mixture  # type: ignore[union-attr]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(Labelled(), FLOW, "velocity")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (256,), generator=generator)
        x0 = mixture.sample(256, generator, labels).float()
        noise = torch.randn(256, 2, generator=generator)
        t = torch.rand(256, generator=generator, dtype=torch.float64)
        dropped = torch.rand(256, generator=generator) < 0.1
        condition = Condition.of_labels(torch.where(dropped, CLASSES, labels), CLASSES)
        level = t[:, None].float()
        out = denoiser((1 - level) * x0 + level * noise, t, condition).raw
        loss = (out - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return denoiser


def pretrained_guided() -> Denoiser:
    """A network trained on the velocity of ``guided_ring``."""
    return copy.deepcopy(_guided_weights())


def main() -> None:
    started = time.monotonic()
    divergences = {
        name: {"exact": lesser_mode(name, learned=False), "learned": lesser_mode(name, learned=True)}
        for name in WEIGHTS
    }
    for name, row in divergences.items():
        print(name, row, f"{time.monotonic() - started:.0f} s", flush=True)
    rings: dict[str, list[dict[str, float]]] = {"phased": [], "truncated": []}
    for seed in range(3):
        start = pretrained(seed)
        for method, rows in rings.items():
            rows.append(ring(method, copy.deepcopy(start), seed))
            print(seed, method, rows[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    RESULTS.write_text(json.dumps({"lesser_mode": divergences, "ring": rings}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
