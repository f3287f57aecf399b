"""TDM: trajectory distribution matching (Luo et al., arXiv 2503.06674).

The student follows a deterministic K-step trajectory. Each of its states x_s, not only the end, must have the teacher's
distribution at its own noise level. For a random segment [s, t_student] of the trajectory, t ~ U(s, t_student) and
x_t = bridge(x_s -> t):

    student:  min  Huber( x0 - sg(x0 + T_w(x_t) - F(x_t)) ) / mean|x0 - T_w(x_t)|,      x_s = alpha_s x0 + sigma_s eps
    fake:     min  E | F(x_t) - target |^2

with T_w the guided teacher and F the fake score. As in the released code, the loss is taken on the x0 that the state
came from (the paper writes x_s).

The range of ``renoise_times`` and ``critic_times`` (by default the same):
    segment    t between s and t_student, as in the paper
    nested     t between s and 1, as in the released code without ``use_separate``. At the low t of late segments an
               error of the mean is hardly visible: for data N(m, S^2), T - F is t^2 / ((1 - t)^2 S^2 + t^2) times it.
Times keep ``margin``, at most a quarter of the range, away from both of its ends.

The fake's target, ``critic``:
    bridge        that of denoising score matching for the distribution of x_s diffused to t, as in Phased DMD
                  (arXiv 2510.27684)
    importance    the paper's: x0, with tempered importance weights; its minimiser is the denoiser of re-noised x0

With a small ``huber`` the gradient is the sign of the direction, so that training converges to a median; 0 is the plain
square. The student is updated first and the fake receives the same sample; the released code trains the fake first,
each on its own sample.

``unify: [1, 2, 4]`` trains one student for several numbers of steps. Each batch has one of them, on which student and
fake (both ``init: new``) are conditioned; a fake without this condition would learn a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.distill import health, matching, sharding
from fewstep.distill.critics import critic_term, importance_critic_term
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import segment_rollout
from fewstep.distill.stage import MAX_STEPS, MAX_WEIGHT, MatchingConfig, StageContext
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, StudentSample, Update
from fewstep.models.backbone import Backbone
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform

SHORTEST = 1e-3  # a segment: one step of a network with 1,000 training times


class SegmentTimes(TimeLaw):
    """A law between the student's state x_s and the time of its step (``segment``) or all noise (``nested``)."""

    short: ClassVar[str] = "within"
    within: Literal["segment", "nested"] = "segment"

    def __str__(self) -> str:
        return f"{self.within}, {super().__str__()}"


class TDM(MatchingConfig):
    published: ClassVar = {
        "guidance": "3.5 (SD1.5, PixArt; code 4.5), 8 (SDXL)",
        "critic": "importance",
        "critic_updates": "1",
        "renoise_times": "segment",
        "huber": "1e-3",
        "batch": "256 (SD1.5), 64 (SDXL), 32 (PixArt)",
        "student.lr": "2e-6 (SD1.5, PixArt), 1e-6 (SDXL)",
        "fake.lr": "2e-5 (SD1.5, PixArt), 5e-6 (SDXL)",
    }
    steps: int = Field(4, ge=1, le=10_000)
    shift: float = Field(1.0, ge=1e-4, le=1e4)
    critic: Literal["bridge", "importance"] = "bridge"
    critic_updates: int = Field(1, ge=1, le=MAX_STEPS)
    renoise_times: SegmentTimes = SegmentTimes()
    critic_times: SegmentTimes | None = None  # None: those of the student
    huber: float = Field(1e-3, ge=0, le=MAX_WEIGHT)
    margin: float = Field(0.02, ge=0, lt=0.2)
    unify: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = ()

    @model_validator(mode="after")
    def _unifies(self) -> Self:
        if self.unify and self.steps not in self.unify:
            raise ValueError(f"unify={list(self.unify)} must contain steps={self.steps}, the default number")
        return self

    @model_validator(mode="after")
    def _has_times(self) -> Self:
        for steps in self.unify or (self.steps,):
            for t_student, s in pairwise(time_uniform(steps, self.shift)):
                where = f"steps={steps} with shift={self.shift:g} has the segment {s:.6g} to {t_student:.6g}"
                if t_student - s < SHORTEST:
                    raise ValueError(f"{where}, shorter than {SHORTEST:g}: take fewer steps or less shift")
                for law in (self.renoise_times, self.critic_times):
                    ends = (
                        [float(end) for end in self.range(law, torch.tensor(s), torch.tensor(t_student))] if law else ()
                    )
                    if law and not law.covers(*ends):
                        raise ValueError(f"{where}, in which the law of times ({law}) has none: widen low and high")
        return self

    def range(self, law: SegmentTimes, level: Tensor, t_student: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest time at which a state of noise ``level`` [B] is re-noised."""
        top = t_student if law.within == "segment" else torch.ones_like(t_student)
        margin = ((top - level) / 4).clamp(max=self.margin)
        return level + margin, top - margin

    def times(self, law: SegmentTimes, micro: MicroBatch) -> Tensor:
        """Times [B] of ``law`` for the states of a micro-batch."""
        sample = micro.sample
        low, high = self.range(law, sample.level, sample.t_student)
        return law.sample(micro.random, len(sample.level), above=low, below=high)

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        if not self.unify:
            return {}
        backbone = teacher.backbone
        if not isinstance(backbone, Backbone):
            raise UserError(f"A {type(backbone).__name__} cannot be conditioned on a step count, which unify needs.")
        if sharding.is_split(teacher):
            raise UserError("unify: a network that shard splits over processes cannot be copied with a step count.")
        networks = {role: backbone.with_step_counts(max(self.unify)) for role in ("student", "fake")}
        return {
            role: Denoiser(network, teacher.schedule, teacher.kind, style=teacher.style)
            for role, network in networks.items()
        }

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        counts = self.unify or (self.steps,)
        guidance = Guidance(self.guidance)

        def rollout(micro: MicroBatch) -> StudentSample:
            steps = counts[int(micro.random.shared.integers(1, len(counts), "count"))]
            if self.unify:
                row = torch.full((micro.batch.size,), steps, device=micro.random.device)
                batch = replace(micro.batch, condition=micro.batch.condition.replace(steps=row))
                micro = replace(micro, batches={**micro.batches, "data": batch})
            return segment_rollout(micro, roles, time_uniform(steps, self.shift)[:-1])

        critic_times = self.critic_times or self.renoise_times

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            t = self.times(self.renoise_times, micro)
            x_t, n = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t.detach(), t, sample.condition, guidance=guidance)
            F = roles.predict("fake", x_t.detach(), t, sample.condition).out.x0
            health.observe(micro, schedule, sample, t, n, T, F)
            direction, weight = T.out.x0 - F, matching.l1_weight(sample.output, T.out.x0)
            if self.huber:
                yield LossTerm("match", matching.huber_surrogate_loss(sample.output, direction, weight, self.huber))
            else:
                yield LossTerm("match", matching.surrogate_loss(sample.output, direction, weight))

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            term = critic_term if self.critic == "bridge" else importance_critic_term
            yield term(micro, roles, self.times(critic_times, micro))

        times = time_uniform(self.steps, self.shift)[:-1]
        return Objective(
            updates=(
                Update("student", ("student",), student, Every(self.critic_updates)),
                Update("fake", ("fake",), fake),
            ),
            rollout=rollout,
            few_step=FewStep(times=times, rule="deterministic", counts=self.unify, shift=self.shift),
            backbone={"step_counts": max(self.unify)} if self.unify else {},
        )
