"""SiD (arXiv 2404.04057) on the unchanged loop: gradients through the inputs of both frozen score networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from plane import critic, distance, gradients, is_unchanged, loop_of, snapshot, train, trained, update_once
from worlds import FLOW, Affine, gaussian

from fewstep.distill.matching import l1_weight, renoise
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import backward_simulation
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import Denoiser


def sid(roles: Roles, low: float, high: float, *, input_grad: bool = True, normalised: bool = True) -> Objective:
    """``(T - F) ((T - x) - a (T - F)) / omega`` in x0 with a = 1, and an ordinary update of the fake."""

    def student(micro: MicroBatch) -> Iterator[LossTerm]:
        sample = micro.sample
        t = micro.random.uniform(len(sample.level), low, high)
        x_t, _ = renoise(FLOW, sample, t, micro.random)
        T = roles.predict("teacher", x_t, t, sample.condition, input_grad=input_grad).out.x0
        F = roles.predict("fake", x_t, t, sample.condition, input_grad=input_grad).out.x0
        omega = 1 / l1_weight(sample.x, T, 1e-5) if normalised else 1.0
        yield LossTerm("sid", ((T - F) * ((T - sample.x) - (T - F)) / omega).sum(1).mean())

    updates = critic(roles), Update("student", ("student",), student)
    return Objective(updates, lambda micro: backward_simulation(micro, roles, [1.0]))


@pytest.mark.parametrize(("input_grad", "expected"), [(True, (0.134228, -0.160803)), (False, (0.2, -0.119799))])
def test_the_gradient_is_the_closed_form(input_grad: bool, expected: tuple[float, float]) -> None:
    """Data N(0, 1), student N(0.4, 0.7^2) and its exact fake at t = 1/2. Without the gradient through the networks
    the result is DMD's gradient, which differs."""
    roles = Roles(
        {
            "teacher": Role(gaussian(0.0, 1.0, 2)),
            "fake": Role(gaussian(0.4, 0.7, 2)),
            "student": trained(Denoiser(Affine(0.4, 0.7), FLOW, "x0")),
        }
    )
    update_once(loop_of(roles, sid(roles, 0.5, 0.5, input_grad=input_grad, normalised=False), batch=200_000), "student")
    measured = torch.stack([g / 2 for g in gradients(roles["student"])])  # two equal dimensions
    torch.testing.assert_close(measured, torch.tensor(expected), atol=0.006, rtol=0)


def test_the_student_learns_through_frozen_networks(base: Denoiser) -> None:
    roles = Roles(
        {
            "teacher": Role(copy.deepcopy(base)),
            "fake": trained(copy.deepcopy(base)),
            "student": trained(copy.deepcopy(base), 1e-3),
        }
    )
    before = distance(roles.denoiser("student"))
    loop = loop_of(roles, sid(roles, 0.02, 0.9))
    update_once(loop, "student")
    assert all(g is not None for g in gradients(roles["student"]))
    assert gradients(roles["fake"]) == [None] * 6
    train(loop, 250)
    assert gradients(roles["teacher"]) == [None] * 6
    assert is_unchanged(roles.denoiser("teacher"), snapshot(base))
    assert distance(roles.denoiser("student")) < 0.2 * before
