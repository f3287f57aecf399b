"""Experts by noise level on the unchanged loop, as in Phased DMD (arXiv 2510.27684): the first one learns the
distribution at a middle level, is frozen, and feeds the second one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from plane import (
    MIXTURE,
    NO_CONDITION,
    TEACHER,
    critic,
    distance,
    energy_distance,
    gradients,
    is_unchanged,
    loop_of,
    snapshot,
    train,
)  # fmt: skip
from worlds import FLOW

from fewstep.distill.matching import l1_weight, renoise, surrogate_loss
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import add_noise, initial_noise
from fewstep.distill.stage import RoleConfig, roles_of_stage
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, StudentSample, Update
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.samplers.euler import euler
from fewstep.samplers.predictor import Predictor

MIDDLE = 0.5


def phase(roles: Roles, t_student: float, level: float) -> Objective:
    """The student takes one Euler step from ``t_student`` to ``level``; before it comes the frozen role ``expert``."""

    def rollout(micro: MicroBatch) -> StudentSample:
        x = initial_noise(micro, FLOW, 1.0)
        if t_student < 1:
            x = x + (t_student - 1) * roles.predict("expert", x, 1.0, NO_CONDITION).out.velocity
        x_s = x + (level - t_student) * roles.predict("student", x, t_student, NO_CONDITION).out.velocity
        ones = torch.ones(len(x), dtype=torch.float64)
        return StudentSample(x_s, level * ones, x_s, t_student * ones, NO_CONDITION)

    def student(micro: MicroBatch) -> Iterator[LossTerm]:
        sample = micro.sample
        t = micro.random.uniform(len(sample.level), level + 0.02, 0.98)
        x_t, _ = renoise(FLOW, sample, t, micro.random)
        T = roles.predict("teacher", x_t, t, NO_CONDITION).out.x0
        F = roles.predict("fake", x_t, t, NO_CONDITION).out.x0
        yield LossTerm("match", surrogate_loss(sample.output, T - F, l1_weight(sample.x, T, 0.1)))

    return Objective((Update("student", ("student",), student, Every(2)), critic(roles, level)), rollout)


def test_the_second_expert_learns_behind_the_frozen_first_one(base: Denoiser) -> None:
    learns = RoleConfig(init="base", lr=1e-3, betas=(0.5, 0.99))
    start = {"teacher": Role(TEACHER), "base": Role(base)}
    first = Roles(roles_of_stage(start, {"student": learns, "fake": learns}, freeze={}))
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    x0 = MIXTURE.sample(2000, 4).float()
    x_s = add_noise(FLOW, x0, noise.roll(1, 0), torch.full((2000,), MIDDLE, dtype=torch.float64))

    @torch.no_grad()
    def distance_at_middle(denoiser: Denoiser) -> float:
        return energy_distance(euler(Predictor(denoiser, NO_CONDITION), noise, (1.0, MIDDLE)), x_s)

    train(loop_of(first, phase(first, 1.0, MIDDLE)), 400)
    assert distance_at_middle(first.denoiser("student")) < 0.3 * distance_at_middle(base)

    second = Roles(roles_of_stage(first, {"student": learns, "fake": learns}, freeze={"expert": "student"}))
    expert, student = second.denoiser("expert"), second.denoiser("student")
    before = snapshot(expert)
    assert is_unchanged(first.denoiser("student"), before)
    assert is_unchanged(student, snapshot(base))
    train(loop_of(second, phase(second, MIDDLE, 0.0)), 600)
    assert is_unchanged(expert, before)
    assert gradients(second["expert"]) == [None] * 6

    routed = Denoiser(Routed([expert.backbone, student.backbone], (0.75, 0.0)), FLOW)
    swapped = Denoiser(Routed([student.backbone, expert.backbone], (0.75, 0.0)), FLOW)
    times = (1.0, MIDDLE, 0.0)
    x = noise + (MIDDLE - 1) * expert(noise, 1.0, NO_CONDITION).velocity
    by_hand = x - MIDDLE * student(x, MIDDLE, NO_CONDITION).velocity
    assert torch.equal(euler(Predictor(routed, NO_CONDITION), noise, times), by_hand)
    assert distance(routed, times) < 0.5 * min(distance(d, times) for d in (base, expert, student, swapped))
