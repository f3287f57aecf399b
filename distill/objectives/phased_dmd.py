"""Phased DMD: one expert an SNR interval, each matched at the noisy end of its own (arXiv 2510.27684).

The K-step grid is cut into phases. Phase k trains the expert that carries samples down to the phase's end s; those
before it are frozen (roles expert1, expert2, ...). The state x_s itself must have the teacher's law at level s, for any
t in (s, 1]: "reverse nested" intervals, so that every phase sees the high noise levels.

    student:  min 1/2 | x_s - sg(x_s + w (T_w(x_t) - F(x_t))) |^2,    w = alpha_ts alpha_t / sigma_t^2 (x0 differences)
    fake:     min E min(1, c std^2) | F(x_t) - target(x_s) |^2        the unbiased target of the bridge s -> t

Inside a phase one step is drawn; the student jumps from it to the end (stochastic gradient truncation). ``pull: x_s``
is the paper's gradient, ``pull: x0`` (default) that of its authors' released trainer: DMD's own, normalised, at the x0
that x_s came from. A phase is a stage of the run: ``freeze: {expert1: student}`` keeps the one before; student and fake
start from the teacher again. Sampling routes by noise level; below a phase in training the teacher still serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from fewstep.distill import health, matching
from fewstep.distill.critics import denoising_loss
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import phase_end
from fewstep.distill.stage import MatchingConfig
from fewstep.distill.update import Anchor, Due, Micro, Objective, Term, Update
from fewstep.models.denoiser import expand_like
from fewstep.models.guidance import Guidance
from fewstep.models.schedules import bridge, shift
from fewstep.models.store import FewStep
from fewstep.samplers.grids import time_uniform


class Config(MatchingConfig):
    published: ClassVar = {
        "guidance": "4 (Wan, Qwen-Image)",
        "critic_updates": "5",
        "clamp": "10",
        "pull": "x_s; x0 in the released trainer",
        "batch": "64",
        "student.lr": "5e-5 (adapter)",
        "fake.lr": "4e-7",
    }
    name: Literal["phased_dmd"] = "phased_dmd"
    steps: int = Field(4, ge=1)
    phases: int = Field(2, ge=1)
    phase: int = Field(1, ge=1)
    shift: float = Field(1.0, gt=0)
    clamp: float = Field(10.0, gt=0)
    pull: Literal["x0", "x_s"] = "x0"

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.steps % self.phases or self.phase > self.phases:
            raise ValueError(f"steps={self.steps} must divide into phases={self.phases}, and phase be one of them")
        return self

    @property
    def experts(self) -> tuple[str, ...]:
        """The role that walks each phase."""
        frozen = tuple(f"expert{k}" for k in range(1, self.phase))
        return (*frozen, "student", *["teacher"] * (self.phases - self.phase))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "fake", *self.experts})


def build(config: Config, roles: Roles) -> Objective:
    schedule = roles.denoiser("teacher").schedule
    times = time_uniform(config.steps, config.shift)
    guidance = Guidance(config.guidance)
    length = config.steps // config.phases
    end = config.phase * length
    walkers = [role for role in config.experts for _ in range(length)]
    cuts = [(times[k * length - 1] + times[k * length]) / 2 for k in range(1, config.phases)]

    def renoised(m: Micro, a: Anchor) -> tuple[Tensor, Tensor, Tensor]:
        t = shift(m.draws.uniform(len(a.s), 1 - end / config.steps, 1.0), config.shift)
        return t, *matching.renoise(schedule, a, t, m.draws)

    def student(m: Micro) -> Iterator[Term]:
        a = m.sample
        t, x_t, n = renoised(m, a)
        T = roles.read("teacher", x_t.detach(), t, a.condition, guidance=guidance)
        F = roles.read("fake", x_t.detach(), t, a.condition).out.x0
        health.observe(m, schedule, a, t, n, T, F)
        direction = T.out.x0 - F
        if config.pull == "x0":
            yield Term("match", matching.pull(a.handle, direction, matching.l1_weight(a.handle, T.out.x0, 1e-4)))
        else:
            weight = bridge(schedule, a.s, t)[0] * schedule.alpha(t) / schedule.sigma(t).square()
            yield Term("match", matching.pull(a.x, direction, expand_like(weight, a.x).to(a.x)))

    def fake(m: Micro) -> Iterator[Term]:
        a = m.sample
        t, x_t, n = renoised(m, a)
        F = roles.read("fake", x_t, t, a.condition).out
        yield Term("critic", denoising_loss(F, schedule, a, t, n, clamp=config.clamp))

    return Objective(
        updates=(
            Update("student", ("student",), student, Due(every=config.critic_updates)),
            Update("fake", ("fake",), fake),
        ),
        rollout=lambda m: phase_end(m, roles, walkers, times, end - length, end),
        few_step=FewStep(times=times[:-1], rule="deterministic", shift=config.shift),
        experts=tuple(zip(config.experts, [*cuts, 0.0], strict=True)),
    )
