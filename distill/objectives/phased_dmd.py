"""Phased DMD: one expert per SNR interval, each matched at the noisy end of its interval (arXiv 2510.27684).

The K-step grid is split into phases. Phase k trains the expert that takes samples down to the phase's end s; the
experts of earlier phases are frozen (roles expert1, expert2, ...). The state x_s itself must have the teacher's
distribution at level s, for any t in (s, 1]: "reverse nested" intervals, so that every phase covers high noise levels.
``renoise_times`` and ``critic_times`` are laws of t that are restricted to (s, 1]; by default they are uniform with the
grid's shift.

    student:  min 1/2 | x_s - sg(x_s + w (T_w(x_t) - F(x_t))) |^2,    w = alpha_ts alpha_t / sigma_t^2 (x0 differences)
    fake:     min E min(1, c std^2) | F(x_t) - target(x_s) |^2        the unbiased target of the bridge s -> t

One step of the phase is chosen at random; from it the student jumps to the end (stochastic gradient truncation).
``match_on: x_s`` is the paper's gradient. ``match_on: x0`` (default) is that of the authors' released trainer: DMD's
own, normalised, at the x0 that x_s came from. Each phase is a stage of the run: ``freeze: {expert1: student}`` keeps
the previous expert; student and fake start from the teacher again. Sampling selects the expert by noise level; below
the levels trained so far, the teacher is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fewstep.core.transfer import like
from fewstep.distill import health, matching
from fewstep.distill.critics import critic_term
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import phased_rollout
from fewstep.distill.stage import MAX_WEIGHT, MatchingConfig, StageContext
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import expand_like
from fewstep.models.guidance import Guidance
from fewstep.models.model_config import FewStep
from fewstep.models.schedules import bridge
from fewstep.samplers.grids import time_uniform


class PhasedDMD(MatchingConfig):
    published: ClassVar = {
        "guidance": "4 (Wan, Qwen-Image)",
        "critic_updates": "5",
        "clamp": "10",
        "match_on": "x_s; x0 in the released trainer",
        "batch": "64",
        "student.lr": "5e-5 (adapter)",
        "fake.lr": "4e-7",
    }
    steps: int = Field(4, ge=1, le=10_000)
    phases: int = Field(2, ge=1, le=10_000)
    phase: int = Field(1, ge=1, le=10_000)
    shift: float = Field(1.0, ge=1e-4, le=1e4)
    clamp: float = Field(10.0, gt=0, le=MAX_WEIGHT)
    match_on: Literal["x0", "x_s"] = "x0"
    renoise_times: TimeLaw | None = None  # None: uniform with the grid's shift
    critic_times: TimeLaw | None = None  # None: those of the student

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps % self.phases or self.phase > self.phases:
            raise ValueError(f"steps={self.steps} must divide into phases={self.phases}, and phase must be one of them")
        s = time_uniform(self.steps, self.shift)[self.phase * self.steps // self.phases]
        for law in (self.renoise_times, self.critic_times):
            if law is not None and not law.covers(s, 1.0):
                raise ValueError(
                    f"phase {self.phase} ends at noise level {s:.4g}; no times of the law ({law}) are above"
                )
        return self

    @property
    def experts(self) -> tuple[str, ...]:
        """The role that takes the steps of each phase."""
        frozen = tuple(f"expert{k}" for k in range(1, self.phase))
        return (*frozen, "student", *["teacher"] * (self.phases - self.phase))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "fake", *self.experts})

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        times = time_uniform(self.steps, self.shift)
        guidance = Guidance(self.guidance)
        length = self.steps // self.phases
        end = self.phase * length
        experts = [role for role in self.experts for _ in range(length)]
        boundaries = [(times[k * length - 1] + times[k * length]) / 2 for k in range(1, self.phases)]

        renoise_times = self.renoise_times or TimeLaw(shift=self.shift)
        critic_times = self.critic_times or renoise_times

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            t = renoise_times.sample(micro.random, len(sample.level), above=sample.level)
            x_t, n = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t.detach(), t, sample.condition, guidance=guidance)
            F = roles.predict("fake", x_t.detach(), t, sample.condition).out.x0
            health.observe(micro, schedule, sample, t, n, T, F)
            if self.match_on == "x0":
                x, weight = sample.output, matching.l1_weight(sample.output, T.out.x0, 1e-4)
            else:
                w = bridge(schedule, sample.level, t)[0] * schedule.alpha(t) / schedule.sigma(t).square()
                x, (weight,) = sample.x, like(sample.x, expand_like(w, sample.x))
            yield LossTerm("match", matching.surrogate_loss(x, T.out.x0 - F, weight))

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            t = critic_times.sample(micro.random, len(micro.sample.level), above=micro.sample.level)
            yield critic_term(micro, roles, t, self.clamp)

        return Objective(
            updates=(
                Update("student", ("student",), student, Every(self.critic_updates)),
                Update("fake", ("fake",), fake),
            ),
            rollout=lambda micro: phased_rollout(micro, roles, experts, times, end - length, end),
            few_step=FewStep(times=times[:-1], rule="deterministic", shift=self.shift),
            experts=tuple(zip(self.experts, [*boundaries, 0.0], strict=True)),
        )
