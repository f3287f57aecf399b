"""Decoupled DMD: the two parts of the guided direction, and where they balance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, Affine, build_objective, gaussian, trained

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import matching
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import MicroBatch, Objective, StudentSample
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser

CONDITIONAL, UNCONDITIONAL = 1.0, 0.0
ALL = {"within": "all", "low": 0.0, "high": 1.0}
HALF = {name: {"within": "all", "low": 0.5, "high": 0.5} for name in ("dm_times", "ca_times")}


class Conditional(nn.Module):
    """The exact denoiser of N(1, 1) under label 0, and of N(0, 1) under the null label 1."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        labels = condition["labels"][:, None].to(x_t)
        mean = CONDITIONAL + labels * (UNCONDITIONAL - CONDITIONAL)
        t = t[:, None].to(x_t)
        variance = (1 - t) ** 2 + t**2
        return mean + (1 - t) / variance * (x_t - (1 - t) * mean)


def labelled(random: KeyedRandom, size: int) -> Batch:
    return Batch(size, (1,), Condition.of_labels(torch.zeros(size, dtype=torch.long), 1))


def world(mu: float, rho: float = 1.0) -> Roles:
    teacher = Denoiser(Conditional(), FLOW, "x0")
    student = trained(Denoiser(Affine(mu, rho), FLOW, "x0"))
    return Roles({"teacher": Role(teacher), "student": student, "fake": Role(gaussian(mu, rho, 1))})


def gradient(roles: Roles, objective: Objective, batch: int) -> float:
    update = next(update for update in objective.updates if update.roles == ("student",))
    Loop(roles, objective, {"data": labelled}, batch).update(update, 0, {0: {}})
    grad = roles.denoiser("student").backbone.mu.grad
    assert isinstance(grad, Tensor)
    return grad.item()


def test_at_equal_times_and_noise_the_two_parts_add_up_to_guided_dmd2(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = KeyedRandom.normal

    def one_noise(self: KeyedRandom, shape: tuple[int, ...], stream: str = "noise") -> Tensor:
        return normal(KeyedRandom(0, 0, "one", 0) if stream == "bridge" else self, shape, stream)

    monkeypatch.setattr(KeyedRandom, "normal", one_noise)
    gradients = []
    for name in ("decoupled_dmd", "dmd2"):
        roles = world(-0.5, 0.7)
        half = {"renoise_times": {"low": 0.5, "high": 0.5}} if name == "dmd2" else HALF
        settings = {"steps": 1, "guidance": 5.0, "critic_updates": 1, **half}
        gradients.append(gradient(roles, build_objective(name, roles, **settings), 500))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)


@pytest.mark.parametrize(("t_student", "mean"), [(1.0, 5.0), (0.75, 3.746657), (0.5, 2.227411), (0.25, 1.239970)])
def test_the_equilibrium_without_normaliser(t_student: float, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """mu* = m_c + (w - 1)(m_c - m_0) E h(t_ca) / E h(t_dm), h = t^2 / (alpha^2 + t^2): CA at cleaner levels than
    the step's weakens the guidance of late steps."""
    monkeypatch.setattr(matching, "l1_weight", lambda *_: 1.0)

    def at(mu: float) -> float:
        def sample(micro: MicroBatch) -> StudentSample:
            noise = micro.random.normal((micro.batch.size, 1))
            x0 = roles.predict("student", noise, t_student, micro.batch.condition).out.x0
            zero = torch.zeros(micro.batch.size, dtype=torch.float64)
            return StudentSample(x0, zero, x0, zero + t_student, micro.batch.condition)

        roles = world(mu)
        times = {"dm_times": ALL, "ca_times": {**ALL, "within": "cleaner"}}
        objective = build_objective("decoupled_dmd", roles, guidance=5.0, critic_updates=1, **times)
        return gradient(roles, dataclasses.replace(objective, rollout=sample), 200_000)

    low, high = at(0.0), at(6.0)  # the expected gradient is linear in mu
    assert 6 * low / (low - high) == pytest.approx(mean, rel=0.01)


def test_augmentation_alone_has_no_fixed_point() -> None:
    """Its expected displacement (w - 1) h (m_c - m_0) is the same for every student, so the mean would diverge."""
    teacher, condition = Denoiser(Conditional(), FLOW, "x0"), labelled(KeyedRandom(0, 0, "", 0), 8).condition
    x_t = torch.linspace(-5, 5, 8)[:, None]
    cond, null = teacher(x_t, 0.5, condition), teacher(x_t, 0.5, condition.null())
    torch.testing.assert_close(cond.x0 - null.x0, torch.full_like(x_t, 0.5))


def mean_after(fake: Role, steps: int, monkeypatch: pytest.MonkeyPatch, rate: float = 0.1) -> float:
    """The student's mean, from 0, after plain gradient descent at t = 0.5 with w = 5 and no normaliser."""
    monkeypatch.setattr(matching, "l1_weight", lambda *_: 1.0)
    roles = world(0.0)
    student = roles["student"]
    student.optimizer = torch.optim.SGD(student.parameters, rate)
    student.optimizer.param_groups[0]["initial_lr"] = rate
    roles = Roles({**roles, "fake": fake})
    settings = {"steps": 1, "guidance": 5.0, "critic_updates": 1, **HALF}
    objective = build_objective("decoupled_dmd", roles, **settings)
    matching_only = dataclasses.replace(objective, updates=objective.updates[:1])
    loop = Loop(roles, matching_only, {"data": labelled}, 8)
    for step in range(steps):
        loop.step(step)
    affine = roles.denoiser("student").backbone
    assert isinstance(affine, Affine)
    return affine.mu.item()


def test_augmentation_without_matching_diverges_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DM = 0 (a fake that is the conditional teacher) the mean is n eta (w - 1) h (m_c - m_0), h = .5 at .5."""
    for steps in (10, 40):
        fake = Role(Denoiser(Conditional(), FLOW, "x0"))
        assert mean_after(fake, steps, monkeypatch) == pytest.approx(steps * 0.1 * 4 * 0.5, rel=1e-5)
