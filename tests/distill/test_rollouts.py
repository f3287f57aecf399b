"""How the student's state arises: the closed forms of dmd.md (section 6, check 4) tell re-noising from an ODE."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from worlds import FLOW, Points, gaussian, mlp_roles

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import backward_simulation, segment_rollout
from fewstep.distill.update import MicroBatch
from fewstep.samplers.grids import time_uniform

TIMES = time_uniform(4)[:-1]


def micro(roles: Roles, size: int, dimensions: int, step: int = 0) -> MicroBatch:
    random = KeyedRandom(0, step, "rollout", 0)
    return MicroBatch({"data": Points(dimensions)(random, size)}, random, step, roles)


@pytest.fixture
def exact() -> Roles:
    """The student is the posterior mean of N(1, 1)."""
    return Roles({"student": Role(gaussian(1.0, 1.0, 1))})


def test_backward_simulation_has_the_variance_of_its_recursion(exact: Roles) -> None:
    """Var x0 after steps 1..4 is 0, .09, .2725, .310725 and the mean 1 at every one; an ODE would end at .5184."""
    expected = {1.0: 0.0, 0.75: 0.09, 0.5: 0.2725, 0.25: 0.310725}
    seen = set()
    for step in range(12):
        a = backward_simulation(micro(exact, 200_000, 1, step), exact, TIMES)
        t_student = a.t_student[0].item()
        seen.add(t_student)
        assert a.x.var().item() == pytest.approx(expected[t_student], abs=3e-3)
        assert a.x.mean().item() == pytest.approx(1.0, abs=5e-3)
        assert not a.level.any()
    assert seen == set(expected)


def test_ode_segment_follows_euler_and_leaves_each_sample_at_its_own_level(exact: Roles) -> None:
    """A linear student on N(1, 1): every Euler step multiplies x - (1-t) by a number, so all moments are known."""
    a = segment_rollout(micro(exact, 400_000, 1), exact, TIMES)
    scale, nodes = 1.0, [*TIMES, 0.0]
    for t, s in pairwise(nodes):
        v = (1 - t) ** 2 + t**2
        x0_gain, noise_gain = (1 - t) / v, t / v
        scale *= (1 - s) * x0_gain + s * noise_gain
        x = a.x[a.level == s]
        assert len(x) == 100_000, "segments are dealt out evenly"
        assert x.mean().item() == pytest.approx(1 - s, abs=0.01)
        assert x.std().item() == pytest.approx(scale, rel=0.01)
    assert scale**2 == pytest.approx(0.5184, abs=1e-4)


def test_gradient_is_kept_in_the_last_evaluation_only() -> None:
    roles = mlp_roles()
    reads: list[bool] = []
    roles.denoiser("student").backbone.register_forward_hook(lambda *_: reads.append(torch.is_grad_enabled()))
    with roles.updating(("student",)):
        for rollout in (backward_simulation, segment_rollout):
            for step in range(4):
                reads.clear()
                a = rollout(micro(roles, 8, 2, step), roles, TIMES)
                assert a.output.requires_grad
                assert reads[-1], "the last evaluation has a graph"
                assert not any(reads[:-1]), "the others do not"


def test_exit_step_does_not_depend_on_the_shard_but_the_noise_does(exact: Roles) -> None:
    def roll(shard: int) -> tuple[float, torch.Tensor]:
        random = KeyedRandom(0, 5, "rollout", shard)
        a = backward_simulation(MicroBatch({"data": Points(1)(random, 4)}, random, 5, exact), exact, TIMES)
        return a.t_student[0].item(), a.x

    (first, x), (second, y) = roll(0), roll(1)
    assert first == second
    assert first == 1.0 or not torch.equal(x, y)


def test_the_start_has_the_variance_of_the_schedule(exact: Roles) -> None:
    a = backward_simulation(micro(exact, 10, 1), exact, (1.0,))
    assert FLOW.sigma(a.t_student)[0] == 1.0
    assert torch.allclose(a.x, torch.ones_like(a.x)), "at t = 1 nothing is known: the posterior mean is the mean"
