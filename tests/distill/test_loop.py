"""Invariants of the loop: which roles receive gradients, shared samples, and accumulation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from worlds import Points, build_objective, mlp, mlp_roles, trained

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import MAX_LOST, Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, StudentSample, Update


def loop_of(name: str = "dmd2", **settings: object) -> Loop:
    roles = mlp_roles()
    return Loop(roles, build_objective(name, roles, **settings), {"data": Points(2)}, batch=16, clip=1.0)


@pytest.mark.parametrize("name", ["dmd2", "tdm"])
def test_only_the_updated_roles_receive_gradients(name: str) -> None:
    loop = loop_of(name)
    roles, (student, fake) = loop.roles, loop.objective.updates
    everyone = {role: list(roles[role].module.parameters()) for role in roles}
    loop.update(student, 0, {0: {}})
    assert all(p.grad is not None for p in everyone["student"])
    assert all(p.grad is None for p in everyone["fake"] + everyone["teacher"])
    loop.update(fake, 0, {0: {}})
    assert all(p.grad is not None for p in everyone["fake"])
    assert all(p.grad is None for p in everyone["student"] + everyone["teacher"])


def test_a_graph_through_a_frozen_role_exists_only_on_request() -> None:
    roles = mlp_roles()
    random = KeyedRandom(0, 0, "test", 0)
    batch, x = Points(2)(random, 4), random.normal((4, 2)).requires_grad_()
    with roles.updating(("student",)):
        assert not roles.predict("fake", x, 0.5, batch.condition).out.raw.requires_grad
        assert roles.predict("fake", x, 0.5, batch.condition, input_grad=True).out.raw.requires_grad
        assert roles.predict("student", x, 0.5, batch.condition).out.raw.requires_grad


def test_an_update_is_due_at_every_nth_step() -> None:
    assert [step for step in range(12) if Every(4)(step)] == [0, 4, 8]
    assert sum(Every(5)(step) for step in range(100)) == Every(5).count(0, 100) == 20
    assert Every(4).count(5, 12) == 1
    assert Every().count(5, 12) == 7


def test_the_critic_of_a_step_receives_the_students_sample_without_its_graph() -> None:
    samples: list[StudentSample] = []
    loop = loop_of("dmd2", steps=1, critic_updates=1)
    student, fake = loop.objective.updates

    def watch(update: Update) -> Update:
        def terms(micro: MicroBatch) -> Iterator[LossTerm]:
            samples.append(micro.sample)
            yield from update.terms(micro)

        return Update(update.name, update.roles, terms, update.due)

    loop.objective = Objective((watch(student), watch(fake)), loop.objective.rollout)
    loop.step(0)
    with_graph, without = samples
    assert with_graph.x.requires_grad
    assert not without.x.requires_grad
    assert torch.equal(with_graph.x.detach(), without.x)


def test_the_gradients_of_terms_that_share_a_sample_add_up() -> None:
    """Each term is back-propagated alone, but the student's gradient is that of the summed loss."""

    def gradient(split: bool) -> list[torch.Tensor]:
        roles = mlp_roles()

        def terms(micro: MicroBatch) -> Iterator[LossTerm]:
            first, second = micro.sample.x.square().mean(), (micro.sample.x - 1).abs().mean()
            if split:
                yield LossTerm("first", first)
                yield LossTerm("second", second)
            else:
                yield LossTerm("both", first + second)

        rollout = build_objective("dmd2", roles, steps=1).rollout
        update = Update("student", ("student",), terms)
        loop = Loop(roles, Objective((update,), rollout), {"data": Points(2)}, batch=16)
        loop.update(update, 0, {0: {}})
        return [p.grad.clone() for p in roles["student"].parameters]

    for split, joint in zip(gradient(True), gradient(False), strict=True):
        assert torch.allclose(split, joint, atol=1e-7)


def test_accumulated_shards_are_averaged() -> None:
    """The gradient of two shards is the mean of the gradients of each."""

    def gradient(shards: list[int]) -> torch.Tensor:
        loop = loop_of("tdm", steps=2)
        loop.accumulate, loop.clip = len(shards), None
        loop.update(loop.objective.updates[0], 3, {shard: {} for shard in shards})
        return torch.cat([p.grad.flatten() for p in loop.roles["student"].parameters])

    assert torch.allclose(gradient([0, 1]), (gradient([0]) + gradient([1])) / 2, atol=1e-7)


def broken(every: int, how: str = "loss") -> Loop:
    """A loop whose update has, at every ``every``-th step, a loss that is NaN, or one with an infinite gradient."""

    def terms(micro: MicroBatch) -> Iterator[LossTerm]:
        out = roles.predict("student", micro.random.normal((4, 2)), 0.5, micro.batch.condition).out.raw.mean()
        if micro.step % every == 0:
            out = out * float("nan") if how == "loss" else (out - out.detach()).abs().sqrt()
        yield LossTerm("match", out)

    roles = Roles({"student": trained(mlp(2, 0))})
    return Loop(roles, Objective((Update("student", ("student",), terms),)), {"data": Points(2)}, batch=4)


def test_an_update_without_a_finite_gradient_is_skipped() -> None:
    loop = broken(every=2)
    before = copy.deepcopy(loop.roles["student"].module.state_dict())
    loop.step(0)
    assert all(torch.equal(before[k], v) for k, v in loop.roles["student"].module.state_dict().items())
    loop.step(1)
    assert loop.roles["student"].updates == 1
    assert not loop.lost


@pytest.mark.parametrize(
    ("how", "cause"), [("loss", "loss/match is nan"), ("gradient", "not the gradient of student.")]
)
def test_a_lost_update_is_reported_at_once_with_its_cause(how: str, cause: str) -> None:
    loop = broken(every=2, how=how)
    loop.step(2)
    (lost,) = loop.lost
    assert (lost.update, lost.step) == ("student", 3)
    assert cause in lost.cause
    assert "update 'student' of step 3 was not applied" in str(lost)


def test_many_lost_updates_in_a_row_end_training_with_the_cause() -> None:
    loop = broken(every=1)
    for step in range(MAX_LOST - 1):
        loop.step(step)
    with pytest.raises(UserError, match=r"'student' of step 20.*loss/match is nan.*no finite gradient 20 times"):
        loop.step(MAX_LOST - 1)


def test_the_updates_of_a_step_read_their_data_once() -> None:
    reads: list[tuple[object, ...]] = []

    def source(random: KeyedRandom, size: int) -> Batch:
        reads.append(random.key)
        return Points(2)(random, size)

    loop = loop_of("dmd2", critic_updates=1)
    loop.sources, loop.accumulate = {"data": source}, 2
    for step in range(3):
        loop.step(step)
    assert reads == [(0, step, "data/data", shard) for step in range(3) for shard in range(2)]


def test_the_average_ramps_up_and_is_used_only_inside_its_context() -> None:
    role = trained(mlp(2, 0), lr=0.1, ema_decay=0.9)
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


def test_an_unknown_role_and_a_role_without_denoiser_are_named() -> None:
    roles = Roles({"head": Role(torch.nn.Linear(2, 1))})
    with pytest.raises(KeyError, match="this stage has head"):
        roles["teacher"]
    with pytest.raises(TypeError, match="'head' is a Linear"):
        roles.denoiser("head")


def test_the_gradient_is_clipped_to_the_norm_and_logged_before() -> None:
    loop = loop_of("dmd2", guidance=1.0)
    loop.clip = 1e-3
    for update in loop.objective.updates:
        metrics, name = loop.update(update, 0, {0: {}}), update.name
        norm = torch.cat([p.grad.flatten() for p in loop.roles[name].parameters]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-2)
        assert metrics[f"grad_norm/{name}"].item() > 2e-3
