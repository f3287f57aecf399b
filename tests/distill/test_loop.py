"""The loop's invariants: who gets gradients, in which order, and that splitting the work changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from worlds import Points, mlp, mlp_roles, trained

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config import objective_module
from fewstep.distill.loop import PATIENCE, Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, StudentSample, Update


def loop(name: str = "dmd2", **settings: object) -> Loop:
    roles = mlp_roles()
    module = objective_module(name)
    return Loop(roles, module.build(module.Config(**settings), roles), {"data": Points(2)}, batch=16, clip=1.0)


@pytest.mark.parametrize("name", ["dmd2", "tdm"])
def test_only_the_updated_roles_receive_gradients(name: str) -> None:
    run = loop(name)
    roles, (student, fake) = run.roles, run.objective.updates
    everyone = {role: list(roles[role].module.parameters()) for role in roles}
    run.update(student, 0, {0: {}})
    assert all(p.grad is not None for p in everyone["student"])
    assert all(p.grad is None for p in everyone["fake"] + everyone["teacher"])
    for p in everyone["student"]:
        p.grad = None
    run.update(fake, 0, {0: {}})
    assert all(p.grad is not None for p in everyone["fake"])
    assert all(p.grad is None for p in everyone["student"] + everyone["teacher"])


def test_a_graph_through_a_frozen_role_exists_only_where_it_is_asked_for() -> None:
    roles = mlp_roles()
    random = KeyedRandom(0, 0, "test", 0)
    batch, x = Points(2)(random, 4), random.normal((4, 2)).requires_grad_()
    with roles.updating(("student",)):
        assert not roles.predict("fake", x, 0.5, batch.condition).out.raw.requires_grad
        assert roles.predict("fake", x, 0.5, batch.condition, through=True).out.raw.requires_grad
        assert roles.predict("student", x, 0.5, batch.condition).out.raw.requires_grad


def test_due_counts_updates() -> None:
    """R = 5: twenty student and a hundred critic updates in a hundred steps; offset and start move them."""
    assert sum(Every(every=5)(step) for step in range(100)) == 20
    assert [step for step in range(12) if Every(every=4, offset=1, start=3)(step)] == [4, 8]
    assert Every(every=4, offset=1, start=3).count(5, 12) == 1


def test_the_critic_of_a_step_sees_the_students_own_sample_without_its_graph() -> None:
    seen: list[StudentSample] = []
    run = loop("dmd2", steps=1, critic_updates=1)
    student, fake = run.objective.updates

    def watch(update: Update) -> Update:
        def terms(m: MicroBatch) -> Iterator[LossTerm]:
            seen.append(m.sample)
            yield from update.terms(m)

        return Update(update.name, update.roles, terms, update.due)

    run.objective = Objective((watch(student), watch(fake)), run.objective.rollout)
    run.step(0)
    with_graph, without = seen
    assert with_graph.x.requires_grad
    assert not without.x.requires_grad
    assert torch.equal(with_graph.x.detach(), without.x)


def test_terms_that_share_a_sample_add_up_to_their_sum() -> None:
    """Each term is back-propagated by itself, yet the student's gradient is that of the summed loss."""

    def gradient(split: bool) -> list[torch.Tensor]:
        roles = mlp_roles()

        def terms(m: MicroBatch) -> Iterator[LossTerm]:
            first, second = m.sample.x.square().mean(), (m.sample.x - 1).abs().mean()
            if split:
                yield LossTerm("first", first)
                yield LossTerm("second", second)
            else:
                yield LossTerm("both", first + second)

        base = objective_module("dmd2")
        rollout = base.build(base.Config(steps=1), roles).rollout
        update = Update("student", ("student",), terms)
        run = Loop(roles, Objective((update,), rollout), {"data": Points(2)}, batch=16)
        run.update(update, 0, {0: {}})
        return [p.grad.clone() for p in roles["student"].parameters]

    for split, joint in zip(gradient(True), gradient(False), strict=True):
        assert torch.allclose(split, joint, atol=1e-7)


def test_accumulated_shards_average() -> None:
    """The gradient of two shards is the mean of the gradients of each."""

    def gradient(shards: list[int]) -> torch.Tensor:
        run = loop("tdm", steps=2)
        run.accumulate, run.clip = len(shards), None
        run.update(run.objective.updates[0], 3, {shard: {} for shard in shards})
        return torch.cat([p.grad.flatten() for p in run.roles["student"].parameters])

    assert torch.allclose(gradient([0, 1]), (gradient([0]) + gradient([1])) / 2, atol=1e-7)


def broken(every: int) -> Loop:
    def terms(m: MicroBatch) -> Iterator[LossTerm]:
        out = roles.predict("student", m.random.normal((4, 2)), 0.5, m.batch.condition).out.raw
        yield LossTerm("loss", out.mean() * (float("nan") if m.step % every == 0 else 1.0))

    roles = Roles({"student": trained(mlp(2, 0))})
    return Loop(roles, Objective((Update("student", ("student",), terms),)), {"data": Points(2)}, batch=4)


def test_a_step_without_finite_gradient_is_skipped() -> None:
    run = broken(every=2)
    before = copy.deepcopy(run.roles["student"].module.state_dict())
    run.step(0)
    assert all(torch.equal(before[k], v) for k, v in run.roles["student"].module.state_dict().items())
    run.step(1)
    assert run.roles["student"].updates == 1


def test_a_role_that_is_lost_ends_the_run_by_name() -> None:
    run = broken(every=1)
    for step in range(PATIENCE - 1):
        run.step(step)
    with pytest.raises(UserError, match=r"'student'.*no finite gradient"):
        run.step(PATIENCE - 1)


def test_average_ramps_up_and_is_swapped_in_only_within_its_context() -> None:
    role = trained(mlp(2, 0), lr=0.1, decay=0.9)
    first = role.parameters[0].detach().clone()
    for parameter in role.parameters:
        parameter.grad = torch.ones_like(parameter)
    role.step()
    live = role.parameters[0].detach().clone()
    decay = min(0.9, 2 / 11)
    expected = decay * first + (1 - decay) * live
    with role.averaged():
        assert torch.allclose(role.parameters[0], expected)
    assert torch.equal(role.parameters[0], live)


def test_unknown_role_and_wrong_kind_are_named() -> None:
    roles = Roles({"head": Role(torch.nn.Linear(2, 1))})
    with pytest.raises(KeyError, match="this stage has head"):
        roles["teacher"]
    with pytest.raises(TypeError, match="'head' is a Linear"):
        roles.denoiser("head")
