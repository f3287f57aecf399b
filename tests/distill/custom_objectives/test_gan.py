"""A GAN objective on the unchanged loop: features of the frozen teacher, and the discriminator as a role."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from plane import NO_CONDITION, data, distance, gradients, is_unchanged, loop_of, snapshot, train, trained, update_once
from torch import Tensor, nn
from torch.nn.functional import softplus
from worlds import FLOW

from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import add_noise, backward_simulation
from fewstep.distill.stage import RoleConfig, make_role
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import Denoiser


class TimedHead(nn.Module):
    """The logits [B] of a sample being data, from the teacher's features of it and their time."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width + 1, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([features, t.to(features)[:, None]], 1))[:, 0]


def gan(roles: Roles, head: nn.Module) -> Objective:
    def logits(micro: MicroBatch, x0: Tensor, name: str, input_grad: bool) -> Tensor:
        t = micro.random.uniform(len(x0), 0.02, 0.7, stream=f"{name}_t")
        x_t = add_noise(FLOW, x0, micro.random.normal(x0.shape, name), t)
        features = roles.predict("teacher", x_t, t, NO_CONDITION, input_grad=input_grad).cond.features
        return head(features["hidden.2"], t)

    def student(micro: MicroBatch) -> Iterator[LossTerm]:
        yield LossTerm("gan", softplus(-logits(micro, micro.sample.x, "generated", input_grad=True)).mean())

    def discriminator(micro: MicroBatch) -> Iterator[LossTerm]:
        on_generated = logits(micro, micro.sample.x, "generated", input_grad=False)
        on_real = logits(micro, micro.batch["x0"], "data", input_grad=False)
        yield LossTerm("discriminator", softplus(on_generated).mean() + softplus(-on_real).mean())

    updates = Update("student", ("student",), student), Update("head", ("discriminator",), discriminator)
    return Objective(updates, lambda micro: backward_simulation(micro, roles, [1.0]))


def test_a_discriminator_on_features_of_the_frozen_teacher_trains_the_student(base: Denoiser) -> None:
    torch.manual_seed(1)
    head = TimedHead()
    roles = Roles(
        {
            "teacher": Role(copy.deepcopy(base)),
            "student": make_role(copy.deepcopy(base), RoleConfig(lr=1e-3, betas=(0.5, 0.99), ema=0.95)),
            "discriminator": trained(head, 4e-3),
        }
    )
    before = distance(roles.denoiser("student"))
    loop = loop_of(roles, gan(roles, head), data=data)
    update_once(loop, "student")
    # the gradient of the student passes through the teacher and the head, and leaves nothing on either
    assert all(g.abs().sum() > 0 for g in gradients(roles["student"]))
    assert gradients(roles["discriminator"]) == [None] * 4
    train(loop, 400)
    assert gradients(roles["teacher"]) == [None] * 6
    assert is_unchanged(roles.denoiser("teacher"), snapshot(base))
    with roles["student"].averaged():  # the last weights oscillate
        assert distance(roles.denoiser("student")) < 0.2 * before
