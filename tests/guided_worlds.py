"""A guided, conditional world in which all networks, and both branches of each, are different functions.

The evaluations of an update are recorded, so that a test can compute the papers' equations again from their inputs,
with each role's function. A term that uses another branch, role, time or weight gives another number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from worlds import FLOW, build_objective, trained

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.adversarial import Heads
from fewstep.distill.data.batch import Batch
from fewstep.distill.explain import Evaluation, evaluations_of
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser

W, D, B = 3.0, 5, 64
REAL = 5.0


class Different(nn.Module):
    """``x0 = offset(condition) + mu + gain (1 - t) x_t``; ``inputs`` is its feature layer."""

    def __init__(self, cond: float, null: float, gain: float) -> None:
        super().__init__()
        self.offsets = (cond, null)
        self.gain = gain
        self.mu = nn.Parameter(torch.zeros(()))
        self.inputs = nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        offset = torch.tensor(self.offsets)[condition["labels"]][:, None]
        return offset + self.mu + self.gain * (1 - t[:, None].to(x_t)) * self.inputs(x_t)


OFFSETS = {
    "teacher": (0.9, -0.4, 0.3),
    "fake": (0.2, 1.5, 0.55),
    "student": (-0.5, 0.8, 0.7),
    "expert1": (0.4, 2.0, 0.2),
}


class Logit(nn.Module):
    """A discriminator that does not tell real from generated samples, so that all weights of f-distill are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.bias.expand(len(features["inputs"]), 1)


def source(random: KeyedRandom, size: int) -> Batch:
    condition = Condition.of_labels(torch.zeros(size, dtype=torch.long), 1)
    real = torch.full((size, D), REAL)
    return Batch(size, (D,), condition, {"x0": real, "noise": random.normal((size, D), "pair")})


@dataclass
class World:
    """The evaluations of one update of an objective, its metrics, and the roles."""

    roles: Roles
    calls: list[Evaluation]
    metrics: dict[str, float]

    @property
    def gradient(self) -> float:
        return self.mu("student").grad.item()  # type: ignore[union-attr]

    def mu(self, role: str) -> nn.Parameter:
        return self.roles.denoiser(role).backbone.mu  # type: ignore[union-attr, return-value]

    def of(self, role: str) -> list[Evaluation]:
        return [call for call in self.calls if call.role == role]

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """x0 and noise of the student's evaluation from which its sample comes, and the time [B, 1]."""
        call = next(c for c in self.of("student") if len(c.x) == B and (c.graph or c is self.of("student")[-1]))
        x0, t = x0_of("student", call), call.t[:, None]
        return x0, (call.x - (1 - t) * x0) / t, t


def x0_of(role: str, call: Evaluation, null: bool = False) -> Tensor:
    """The conditional or unconditional x0 of a role at the inputs of a recorded evaluation."""
    cond, unconditional, gain = OFFSETS[role]
    return (unconditional if null else cond) + gain * (1 - call.t[:B, None]) * call.x[:B].double()


def guided(call: Evaluation, *more: Evaluation) -> tuple[Tensor, Tensor]:
    """(T_w, T_c) of the teacher, which must have been evaluated for both branches, in one batch or one after the other,
    at the same inputs."""
    assert [label for each in (call, *more) for label in each.condition["labels"].tolist()] == [0] * B + [1] * B
    for each in more:
        assert torch.equal(each.x, call.x)
        assert torch.equal(each.t, call.t)
    cond, null = x0_of("teacher", call), x0_of("teacher", call, null=True)
    return null + W * (cond - null), cond


def run(name: str, update: str = "student", step: int = 0, **settings: object) -> World:
    networks = {role: Denoiser(Different(*offsets), FLOW, "x0", ("inputs",)) for role, offsets in OFFSETS.items()}
    roles = {role: Role(network) for role, network in networks.items()}
    roles |= {role: trained(networks[role]) for role in ("student", "fake")}
    roles["discriminator"] = trained(Heads({"inputs": D}) if settings.get("gan") else Logit(), lr=0.0)
    view = Roles(roles)
    objective = build_objective(name, view, guidance=W, critic_updates=1, **settings)
    loop = Loop(view, objective, {"data": source}, B)
    chosen = next(u for u in objective.updates if u.name == update)
    metrics: dict[str, Tensor] = {}
    calls = evaluations_of(view, lambda: metrics.update(loop.update(chosen, step, {0: {}})))
    return World(view, calls, {key: value.item() for key, value in metrics.items()})


def per_sample(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def fake_at(world: World, call: Evaluation) -> Tensor:
    """The fake's x0: evaluated without guidance, at the inputs of ``call``."""
    fake = world.of("fake")[-1]
    assert (fake.condition["labels"] == 0).all()
    assert torch.equal(fake.x, call.x[:B])
    assert torch.equal(fake.t, call.t[:B])
    return x0_of("fake", fake)
