"""TDM: trajectory distribution matching (Luo et al., arXiv 2503.06674).

The student walks a deterministic K-step trajectory; each of its states x_s, not only the end, must have the teacher's
law at its own noise level. For a random segment [s, t_in] of the trajectory, t ~ U(s, t_in), x_t = bridge(x_s -> t):

    student:  min  Huber( x0 - sg(x0 + T_w(x_t) - F(x_t)) ) / mean|x0 - T_w(x_t)|,      x_s = alpha_s x0 + sigma_s eps
    fake:     min  E | F(x_t) - target |^2

with T_w the guided teacher and F the fake score. As in the released code, the loss is taken on the x0 that the state
came from (the paper writes x_s). ``times: segment`` keeps the ranges disjoint, as the paper does; ``nested`` (the code
without its ``use_separate``) is t ~ U(s, 1), since at the low t of late segments an error in the mean hardly shows: of
data N(m, S^2), T - F is t^2 / ((1 - t)^2 S^2 + t^2) times it. With a small ``huber`` the gradient is the sign of the
direction, and comes to rest at its median; 0 is the plain square. ``critic`` chooses the fake's target: ``bridge`` is
unbiased for the law of x_s diffused to t (Phased DMD's, arXiv 2510.27684); ``importance`` is the paper's, regression to
x0 with tempered importance weights, whose minimiser is the denoiser of re-noised x0. ``unify: [1, 2, 4]`` draws the
number of steps anew and tells it to student and fake (both ``init: new``): one student for all of them, where a fake
that is not told would learn a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.distill import health, matching
from fewstep.distill.critics import denoising_loss, importance_weight, weighted_clean_loss
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import ode_segment
from fewstep.distill.stage import MatchingConfig
from fewstep.distill.update import Anchor, Due, Micro, Objective, Term, Update
from fewstep.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.store import FewStep
from fewstep.models.unet import UNet
from fewstep.samplers.grids import time_uniform


class Config(MatchingConfig):
    published: ClassVar = {
        "guidance": "3.5 (SD1.5, PixArt; code 4.5), 8 (SDXL)",
        "critic": "importance",
        "critic_updates": "1",
        "times": "segment",
        "huber": "1e-3",
        "batch": "256 (SD1.5), 64 (SDXL), 32 (PixArt)",
        "student.lr": "2e-6 (SD1.5, PixArt), 1e-6 (SDXL)",
        "fake.lr": "2e-5 (SD1.5, PixArt), 5e-6 (SDXL)",
    }
    name: Literal["tdm"] = "tdm"
    steps: int = Field(4, ge=1)
    shift: float = Field(1.0, gt=0)
    critic: Literal["bridge", "importance"] = "bridge"
    critic_updates: int = Field(1, ge=1)
    times: Literal["segment", "nested"] = "segment"
    huber: float = Field(1e-3, ge=0)
    margin: float = Field(0.02, ge=0, lt=0.2)
    unify: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _unifies(self) -> Config:
        if self.unify and self.steps not in self.unify:
            raise ValueError(f"unify={list(self.unify)} must contain steps={self.steps}, the number used by default")
        return self

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        if not self.unify:
            return {}
        if not isinstance(teacher.backbone, UNet):
            raise UserError(
                f"unify needs a network that can be told a step count, not {type(teacher.backbone).__name__}."
            )
        backbones = {role: teacher.backbone.for_step_counts(max(self.unify)) for role in ("student", "fake")}
        return {
            role: Denoiser(backbone, teacher.schedule, teacher.kind, style=teacher.style)
            for role, backbone in backbones.items()
        }


def build(config: Config, roles: Roles) -> Objective:
    schedule = roles.denoiser("teacher").schedule
    counts = config.unify or (config.steps,)
    guidance = Guidance(config.guidance)

    def rollout(m: Micro) -> Anchor:
        steps = counts[int(m.draws.shared.integers(1, len(counts), "count"))]
        if config.unify:
            told = torch.full((m.batch.size,), steps, device=m.draws.device)
            batch = replace(m.batch, condition=m.batch.condition.replace(steps=told))
            m = replace(m, batches={**m.batches, "data": batch})
        return ode_segment(m, roles, time_uniform(steps, config.shift)[:-1])

    def renoised(m: Micro, a: Anchor) -> tuple[Tensor, Tensor, Tensor]:
        u = m.draws.uniform(len(a.s))
        top = a.t_in if config.times == "segment" else torch.ones_like(a.t_in)
        low, high = a.s + config.margin, top - config.margin
        t = low + u * (high - low)
        return t, *matching.renoise(schedule, a, t, m.draws)

    def student(m: Micro) -> Iterator[Term]:
        a = m.sample
        t, x_t, n = renoised(m, a)
        T = roles.read("teacher", x_t.detach(), t, a.condition, guidance=guidance)
        F = roles.read("fake", x_t.detach(), t, a.condition).out.x0
        health.observe(m, schedule, a, t, n, T, F)
        direction, weight = T.out.x0 - F, matching.l1_weight(a.handle, T.out.x0)
        if config.huber:
            yield Term("match", matching.huber_pull(a.handle, direction, weight, config.huber))
        else:
            yield Term("match", matching.pull(a.handle, direction, weight))

    def fake(m: Micro) -> Iterator[Term]:
        a = m.sample
        t, x_t, n = renoised(m, a)
        F = roles.read("fake", x_t, t, a.condition).out
        if config.critic == "bridge":
            yield Term("critic", denoising_loss(F, schedule, a, t, n))
        else:
            yield Term("critic", weighted_clean_loss(F, a, importance_weight(schedule, a, a.handle, t, n)))

    return Objective(
        updates=(
            Update("student", ("student",), student, Due(every=config.critic_updates)),
            Update("fake", ("fake",), fake),
        ),
        rollout=rollout,
        few_step=FewStep(
            times=time_uniform(config.steps, config.shift)[:-1],
            rule="deterministic",
            counts=config.unify,
            shift=config.shift,
        ),
        backbone={"step_counts": max(config.unify)} if config.unify else {},
    )
