"""Updates that the device skips by a flag, which the host reads later: as if the host had read it at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Points, mlp

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import roles as roles_module
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.attention import without_cudnn

LOST = (0, 4, 5, 10)


class AtOnce(Role):
    """A role with the same fused optimizer, which does not skip on the device: the host reads every norm."""

    @property
    def skips(self) -> bool:
        return False


def loop_of(kind: type[Role], lost: tuple[int, ...] = LOST, **settings: Any) -> Loop:
    """A loop that trains a network with an average; at the steps ``lost`` its gradient is infinite (even ones), or its
    input is NaN in sample 2."""
    torch.manual_seed(0)
    module = mlp(2, 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    optimizer.param_groups[0]["initial_lr"] = 1e-2

    def terms(micro: MicroBatch) -> Iterator[LossTerm]:
        x = micro.random.normal((4, 2))
        if micro.step in lost and micro.step % 2:
            x[2, 0] = torch.nan
        loss = (roles.predict("student", x, 0.5, micro.batch.condition).out.raw - x).square().mean()
        micro.total("samples", torch.tensor(torch.nan if micro.step in lost else 4.0))
        if micro.step in lost and micro.step % 2 == 0:
            loss = loss + (loss - loss.detach()).abs().sqrt()
        yield LossTerm("match", loss)

    def after(_: KeyedRandom, totals: Mapping[str, Tensor]) -> None:
        counted.append(totals["samples"].item())

    counted: list[float] = []
    roles = Roles({"student": kind(module, optimizer, ema_decay=0.9)})
    objective = Objective((Update("student", ("student",), terms, after=after),), state={"n": torch.zeros(1)})
    loop = Loop(roles, objective, {"data": Points(2)}, batch=4, clip=0.1, **settings)
    loop.counted = counted  # type: ignore[attr-defined]
    return loop


def test_a_skipped_update_changes_neither_weights_nor_moments_nor_average() -> None:
    at_once, later = loop_of(AtOnce), loop_of(Role, read_every=6)
    for step in range(12):
        for loop in (at_once, later):
            loop.step(step)
    for ours, theirs in zip(later.roles["student"].parameters, at_once.roles["student"].parameters, strict=True):
        assert torch.equal(ours, theirs)
        moments = [loop.roles["student"].optimizer.state[p] for loop, p in ((later, ours), (at_once, theirs))]  # type: ignore[union-attr]
        for name, value in moments[0].items():
            assert torch.equal(value, moments[1][name]), name
    assert (later.roles["student"].updates, at_once.roles["student"].updates) == (12, 8), "tries are counted"


def test_the_average_skips_what_the_weights_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles_module, "AT_ONCE", 1)  # several groups
    at_once, later = loop_of(AtOnce, lost=(3,)), loop_of(Role, lost=(3,), read_every=6)
    for step in range(3):
        for loop in (at_once, later):
            loop.step(step)
    before = {name: value.clone() for name, value in later.roles["student"].average.items()}
    later.step(3)
    assert all(torch.equal(value, before[name]) for name, value in later.roles["student"].average.items())
    torch.testing.assert_close(at_once.roles["student"].average, before)  # by one kernel, which rounds otherwise
    later.step(4)
    assert not all(torch.equal(value, before[name]) for name, value in later.roles["student"].average.items())


def test_skipped_updates_are_reported_when_they_are_read() -> None:
    loop = loop_of(Role, read_every=6)
    found = []
    for step in range(12):
        loop.step(step)
        found.append([(lost.step, lost.cause.split(";")[0]) for lost in loop.lost])
    gradient = "its losses are finite, but not its gradient"
    assert found[5] == [(1, gradient), (5, gradient), (6, "loss/match is nan")]
    assert found[11] == [(11, gradient)]
    assert not any(found[:5] + found[6:11])


def test_the_origin_is_found_by_repeating_the_update() -> None:
    loop = loop_of(Role, lost=(1,), read_every=3)
    for step in range(3):
        loop.step(step)
    assert loop.lost[0].cause.startswith("loss/match is nan; ")
    assert "sample 2" in loop.lost[0].cause


def test_whether_training_is_sound_is_read_at_once() -> None:
    loop = loop_of(Role, read_every=100)
    for step, sound in enumerate((False, True, True, True, False, False, True)):
        loop.step(step)
        if step in (0, 2, 5, 6):
            assert loop.sound == sound


def test_what_follows_a_skipped_update_gets_totals_of_zero() -> None:
    loop = loop_of(Role, read_every=6)
    for step in range(6):
        loop.step(step)
    assert loop.counted == [0, 4, 4, 4, 0, 0]  # type: ignore[attr-defined]


def test_many_skipped_updates_in_a_row_end_training() -> None:
    loop = loop_of(Role, lost=tuple(range(1, 50)), read_every=8, max_lost={"student": 5})
    for step in range(7):
        loop.step(step)
    with pytest.raises(UserError, match=r"of step 6 was not applied.*no finite gradient 5 times in a row"):
        loop.step(7)


def test_a_skipped_step_does_not_make_the_next_one_skip() -> None:
    """A role may step in one update with roles that skip on the device, and in another with one that does not."""
    loop = loop_of(Role)
    role = loop.roles["student"]
    for lost, moves in ((torch.tensor(1.0), False), (None, True), (torch.tensor(0.0), True), (None, True)):
        before = [parameter.detach().clone() for parameter in role.parameters]
        for parameter in role.parameters:
            parameter.grad = torch.ones_like(parameter)
        role.step(lost)
        same = [torch.equal(old, new) for old, new in zip(before, role.parameters, strict=True)]
        assert same == [not moves] * len(same)


def test_a_search_for_the_cause_leaves_cudnn_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats an update, with its backward pass, after the step."""
    allowed: list[bool] = []

    def note(*_: object) -> None:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())

    monkeypatch.setattr("fewstep.distill.loop.without_cudnn", lambda _: without_cudnn(torch.device("cuda")))
    loop = loop_of(Role, lost=(1,))
    loop.roles.denoiser("student").backbone.register_forward_hook(note)
    for step in range(2):
        loop.step(step)
    assert len(loop.lost) == 1
    assert allowed == 3 * [False], "two steps and the repeated one"
