"""Rollouts: closed forms that distinguish re-noising from an ODE, gradients, and shared random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from worlds import FLOW, Points, gaussian, mlp_roles

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import (
    backward_simulation,
    initial_noise,
    phased_rollout,
    random_time_rollout,
    segment_rollout,
)
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import MicroBatch, StudentSample
from fewstep.models.schedules import VE
from fewstep.samplers.grids import time_uniform

TIMES = time_uniform(4)[:-1]


def micro_batch(roles: Roles, size: int, dimensions: int, step: int = 0, shard: int = 0) -> MicroBatch:
    random = KeyedRandom(0, step, "rollout", shard)
    return MicroBatch({"data": Points(dimensions)(random, size)}, random, step, roles)


@pytest.fixture
def exact() -> Roles:
    """The student is the posterior mean of N(1, 1)."""
    return Roles({"student": Role(gaussian(1.0, 1.0, 1))})


def test_backward_simulation_has_the_variance_of_its_recursion(exact: Roles) -> None:
    """Var x0 after steps 1..4 is 0, .09, .2725, .310725 and the mean is always 1; an ODE would end at .5184."""
    sample = backward_simulation(micro_batch(exact, 400_000, 1), exact, TIMES)
    assert not sample.level.any()
    for t_student, variance in {1.0: 0.0, 0.75: 0.09, 0.5: 0.2725, 0.25: 0.310725}.items():
        x = sample.x[sample.t_student == t_student]
        assert len(x) == 100_000, "every step is the last one of as many samples"
        assert x.var().item() == pytest.approx(variance, abs=4e-3)
        assert x.mean().item() == pytest.approx(1.0, abs=6e-3)


def test_the_segment_rollout_follows_euler_and_stops_each_sample_at_its_own_level(exact: Roles) -> None:
    """A linear student on N(1, 1): every Euler step multiplies x - (1-t) by a number, so all moments are known."""
    sample = segment_rollout(micro_batch(exact, 400_000, 1), exact, TIMES)
    scale, nodes = 1.0, [*TIMES, 0.0]
    for t, s in pairwise(nodes):
        v = (1 - t) ** 2 + t**2
        x0_gain, noise_gain = (1 - t) / v, t / v
        scale *= (1 - s) * x0_gain + s * noise_gain
        x = sample.x[sample.level == s]
        assert len(x) == 100_000, "every segment has as many samples"
        assert x.mean().item() == pytest.approx(1 - s, abs=0.01)
        assert x.std().item() == pytest.approx(scale, rel=0.01)
    assert scale**2 == pytest.approx(0.5184, abs=1e-4)


def test_only_the_last_evaluation_has_a_graph() -> None:
    roles = mlp_roles()
    graphs: list[bool] = []
    roles.denoiser("student").backbone.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    with roles.updating(("student",)):
        for rollout in (backward_simulation, segment_rollout):
            for step in range(4):
                graphs.clear()
                sample = rollout(micro_batch(roles, 8, 2, step), roles, TIMES)
                assert sample.output.requires_grad
                assert graphs[-1]
                assert not any(graphs[:-1])


def phased(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    return phased_rollout(micro, roles, ("student",) * 4, [*times, 0.0], 1, 4)


@pytest.mark.parametrize("rollout", [backward_simulation, segment_rollout, phased])
@pytest.mark.parametrize("step", range(3))
def test_each_step_has_as_many_samples_however_the_batch_is_divided(
    exact: Roles, rollout: Callable[..., StudentSample], step: int
) -> None:
    """32 x 1, 4 x 8 and 1 x 32 micro-batches x samples, in one process or several."""

    def t_student(micro_batches: int) -> Tensor:
        samples = [
            rollout(micro_batch(exact, 32 // micro_batches, 1, step, shard), exact, TIMES)
            for shard in range(micro_batches)
        ]
        return torch.cat([sample.t_student for sample in samples])

    whole = t_student(1)
    _, counts = whole.unique(return_counts=True)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(t_student(4), whole)
    assert torch.equal(t_student(32), whole)


def test_the_turns_start_anew_in_each_step_and_the_noise_in_each_micro_batch(exact: Roles) -> None:
    first = {float(backward_simulation(micro_batch(exact, 1, 1, step), exact, TIMES).t_student) for step in range(32)}
    assert first == set(TIMES)
    a, b = (backward_simulation(micro_batch(exact, 4, 1, 0, shard), exact, TIMES).x for shard in (0, 1))
    assert not torch.equal(a, b)


def test_from_pure_noise_the_exact_student_predicts_the_mean(exact: Roles) -> None:
    sample = backward_simulation(micro_batch(exact, 10, 1), exact, (1.0,))
    assert FLOW.sigma(sample.t_student)[0] == 1.0
    assert torch.allclose(sample.x, torch.ones_like(sample.x)), "at t = 1 the posterior mean is the mean"


def random_times(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    return random_time_rollout(micro, roles, len(times), TimeLaw(low=0.25, high=0.95))


@pytest.mark.parametrize("rollout", [backward_simulation, segment_rollout, phased, random_times])
def test_times_and_levels_are_float64_and_samples_float32(exact: Roles, rollout: Callable[..., StudentSample]) -> None:
    sample = rollout(micro_batch(exact, 8, 1), exact, TIMES)
    assert (sample.t_student.dtype, sample.level.dtype) == (torch.float64, torch.float64)
    assert (sample.x.dtype, sample.output.dtype) == (torch.float32, torch.float32)


def test_random_times_fall_and_every_state_is_noisier_than_the_next(exact: Roles) -> None:
    """The network is evaluated at falling times of each sample, the last of which is that of its sample."""
    seen: list[tuple[Tensor, Tensor]] = []
    exact.denoiser("student").backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0][:, 0].clone(), inputs[1].clone()))
    )
    for step in range(6):
        seen.clear()
        sample = random_times(micro_batch(exact, 64, 1, step), exact, [1.0] * 6)
        sizes = [len(t) for _, t in seen[:-1]]
        assert sizes == sorted(sizes, reverse=True)
        assert torch.equal(seen[-1][1], sample.t_student)
        if len(seen) > 1:
            assert (seen[0][1] == 1).all()
            for (_, earlier), (_, later) in pairwise(seen[:-1]):
                assert earlier.min() >= 0.25
                assert later.max() <= 0.95
            later = sample.t_student < 1
            assert (sample.t_student[later] <= 0.95).all()


def test_a_rollout_starts_at_the_noise_level_of_its_first_time(exact: Roles) -> None:
    noise = initial_noise(micro_batch(exact, 100_000, 1), VE(sigma_max=20.0), 1.0)
    assert noise.std().item() == pytest.approx(20, rel=0.01)
