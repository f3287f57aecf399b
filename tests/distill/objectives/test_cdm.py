"""CDM: the random times, the extrapolated input, and the interpolation of the fake towards the student."""

from __future__ import annotations

import pytest
import torch
from worlds import FLOW, Affine, Points, build_objective, gaussian, mlp, mlp_roles, trained

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import add_noise, random_time_rollout
from fewstep.distill.stage import RoleConfig, roles_of_stage
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import MicroBatch, StudentSample
from fewstep.models.adapters import share_network
from fewstep.models.denoiser import Denoiser


def rollout_sample(roles: Roles, step: int, batch: int = 16, max_steps: int = 6) -> StudentSample:
    random = KeyedRandom(0, step, "rollout", 0)
    micro = MicroBatch({"data": Points(2)(random, batch)}, random, step, roles)
    with torch.no_grad():
        return random_time_rollout(micro, roles, max_steps, TimeLaw(low=0.25, high=0.95))


def test_the_student_starts_from_pure_noise_with_the_expected_frequency() -> None:
    """P(t_student = 1) = E[1 / N] = (1 + 1/2 + ... + 1/6) / 6; other times lie within the inner range."""
    roles = Roles({"student": trained(Denoiser(Affine(0.0, 0.5), FLOW, "x0"))})
    times = torch.cat([rollout_sample(roles, step).t_student for step in range(800)])
    assert (times == 1).double().mean().item() == pytest.approx(sum(1 / n for n in range(1, 7)) / 6, abs=0.02)
    inner = times[times < 1]
    assert inner.min() >= 0.25
    assert inner.max() <= 0.95


def test_a_straight_flow_leads_every_state_to_the_same_point() -> None:
    """If all data are one point, the student's x0 is that point, and extrapolation stays on the true line."""
    student = Role(gaussian(0.7, 1e-6, 2))
    sample = rollout_sample(Roles({"student": student}), 3, batch=200)
    assert sample.noise is not None
    torch.testing.assert_close(sample.x, torch.full_like(sample.x, 0.7), atol=1e-4, rtol=0)
    for t in (0.1, 0.6, 1.0):
        times = torch.full((200,), t, dtype=torch.float64)
        x = add_noise(FLOW, sample.x, sample.noise, times)
        torch.testing.assert_close((x - (1 - t) * 0.7) / t, sample.noise, atol=1e-3, rtol=0)


def test_the_implied_noise_and_x0_reproduce_the_state() -> None:
    """x_t' = (1 - t') x0 + t' e is e at 1, x0 at 0, and the state at its own time."""
    roles = mlp_roles()
    random = KeyedRandom(0, 0, "rollout", 0)
    micro = MicroBatch({"data": Points(2)(random, 50)}, random, 0, roles)
    sample = random_time_rollout(micro, roles, 1, TimeLaw())  # one step: the state is the initial noise
    assert sample.noise is not None
    assert (sample.t_student == 1).all()
    torch.testing.assert_close(
        add_noise(FLOW, sample.x, sample.noise, sample.t_student),
        KeyedRandom(0, 0, "rollout", 0).normal((50, 2), "start"),
    )


def test_the_fake_moves_towards_the_student_after_its_update() -> None:
    roles = mlp_roles()
    roles["fake"].optimizer.param_groups[0]["initial_lr"] = 0.0  # type: ignore[union-attr]
    before = [p.detach().clone() for p in roles["fake"].parameters]
    objective = build_objective("cdm", roles, max_steps=2, guidance=1.0, blend=0.25, critic_updates=7)
    Loop(roles, objective, {"data": Points(2)}, 8).step(1)  # only the fake is due
    for old, new, student in zip(before, roles["fake"].parameters, roles["student"].parameters, strict=True):
        torch.testing.assert_close(new.detach(), old + 0.25 * (student.detach() - old))


def test_all_three_terms_reach_the_student_and_only_it() -> None:
    roles = mlp_roles()
    objective = build_objective("cdm", roles, max_steps=3, guidance=1.0)
    metrics = Loop(roles, objective, {"data": Points(2)}, 16).update(objective.updates[1], 0, {0: {}})
    assert {"loss/ca", "loss/dm", "loss/cdm"} <= set(metrics)
    assert all(p.grad is not None for p in roles["student"].parameters)
    assert all(p.grad is None for name in ("teacher", "fake") for p in roles[name].parameters)


def test_the_student_is_sampled_at_shifted_times() -> None:
    """Stable Diffusion 3's shift of 3 moves 1, .75, .5, .25 to 1, .9, .75, .5."""
    few = build_objective("cdm", mlp_roles(), steps=4, shift=3.0).few_step
    assert few is not None
    assert few.times == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert (few.rule, few.shift) == ("deterministic", 3.0)


def test_interpolation_is_for_copies() -> None:
    """Two adapters share the teacher's network: their factors could be averaged, but not the networks."""
    pytest.importorskip("peft")
    teacher = mlp(2, 0)
    share_network(teacher, rank=2, alpha=None, targets=["layers.0"])
    rates = {role: RoleConfig(lr=1e-3) for role in ("student", "fake")}
    roles = Roles(roles_of_stage({"teacher": Role(teacher)}, rates, {}))
    with pytest.raises(UserError, match=r"these train adapters: fake and student.*Set blend: 0"):
        build_objective("cdm", roles)
    objective = build_objective("cdm", roles, blend=0.0, guidance=1.0, max_steps=2)
    before = [p.detach().clone() for p in roles["student"].parameters]
    Loop(roles, objective, {"data": Points(2)}, 8).step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, roles["student"].parameters, strict=True))
