"""Distribution matching and a preference (Diffusion-DPO, arXiv 2311.12908) in one update, from two sources."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from plane import NO_CONDITION, TEACHER, critic, data, distance, gradients, loop_of, train, trained
from torch import Tensor
from torch.nn.functional import softplus
from worlds import FLOW, Points

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.matching import l1_weight, renoise, surrogate_loss
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import add_noise, backward_simulation
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import Denoiser


def preference_pairs(random: KeyedRandom, size: int) -> Batch:
    """Pairs of samples of the data; the winner is the one with the larger first coordinate."""
    x0 = data(random, 2 * size)["x0"]
    order = x0[:, 0].view(2, size).argsort(0)[:, :, None].expand(2, size, 2)
    loser, winner = x0.view(2, size, 2).gather(0, order)
    return Batch(size, (2,), NO_CONDITION, {"winner": winner, "loser": loser})


def joint(roles: Roles, beta: float, terms: tuple[str, ...]) -> Objective:
    def match(micro: MicroBatch) -> Tensor:
        sample = micro.sample
        t = micro.random.uniform(len(sample.level), 0.02, 0.98)
        x_t, _ = renoise(FLOW, sample, t, micro.random)
        T, F = (roles.predict(name, x_t, t, NO_CONDITION).out.x0 for name in ("teacher", "fake"))
        return surrogate_loss(sample.output, T - F, l1_weight(sample.x, T, 0.1))

    def preference(micro: MicroBatch) -> Tensor:
        pair = micro.batches["pairs"]
        t = micro.random.uniform(pair.size, stream="pair_t").repeat(2)
        noise = micro.random.normal((pair.size, 2), "pair").repeat(2, 1)  # winner and loser share noise and t
        x0 = torch.cat([pair["winner"], pair["loser"]])
        x_t, velocity = add_noise(FLOW, x0, noise, t), noise - x0
        policy, reference = (
            (roles.predict(name, x_t, t, NO_CONDITION).out.velocity - velocity).square().mean(1)
            for name in ("student", "reference")
        )
        winner, loser = (policy - reference).chunk(2)
        return softplus(beta / 2 * (winner - loser)).mean()

    def student(micro: MicroBatch) -> Iterator[LossTerm]:
        for name, loss in (("match", match), ("preference", preference)):
            if name in terms:
                yield LossTerm(name, loss(micro))

    updates = Update("student", ("student",), student), critic(roles)
    return Objective(updates, lambda micro: backward_simulation(micro, roles, [1.0]))


def joint_loop(base: Denoiser, beta: float, *terms: str) -> Loop:
    roles = Roles(
        {
            "teacher": Role(TEACHER),
            "reference": Role(base),
            "fake": trained(copy.deepcopy(base)),
            "student": trained(copy.deepcopy(base), 1e-3),
        }
    )
    return loop_of(roles, joint(roles, beta, terms), data=Points(2), pairs=preference_pairs)


def test_joint_terms_add_their_gradients_and_both_have_their_effect(base: Denoiser) -> None:
    loops = [joint_loop(base, 2.0, *terms) for terms in (("match", "preference"), ("match",), ("preference",))]
    students = [next(u for u in loop.objective.updates if "student" in u.roles) for loop in loops]
    first = [loop.update(student, 0, {0: {}}) for loop, student in zip(loops, students, strict=True)]
    torch.testing.assert_close(first[0]["loss/preference"], torch.tensor(2.0).log())  # the policy is the reference
    for both, match, preference in zip(*(gradients(loop.roles["student"]) for loop in loops), strict=True):
        assert match.abs().sum() > 0
        assert preference.abs().sum() > 0
        torch.testing.assert_close(both, match + preference, atol=1e-7, rtol=1e-4)

    before = distance(base)
    metrics = [train(loop, 300) for loop in loops]
    both, only_match, only_preference = (distance(loop.roles.denoiser("student")) for loop in loops)
    assert metrics[0]["loss/preference"] < 0.3
    assert only_match < both < 0.5 * before < only_preference  # alone, the preference leaves the data
