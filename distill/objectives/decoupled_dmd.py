"""Decoupled DMD: guidance and distribution matching, each at its own time (arXiv 2511.22677).

The guided direction of DMD2 is a sum, T_w - F = (T_c - F) + (w - 1)(T_c - T_0): distribution matching (DM), which
keeps the student in the teacher's distribution, and CFG augmentation (CA), which makes a few steps enough and does not
depend on the fake score. The paper evaluates them at different times. Its best variant, the default here, is the hybrid

    t_dm at all levels      t_ca at cleaner levels than the step that produced the sample, t_ca < t_student

    student:  min 1/2 | x - sg(x + DM(x_t_dm) / a + CA(x_t_ca) / b) |^2                       every R-th step
    fake:     min E | F(x_t) - x |^2 in the network's own prediction type, t ~ ``critic_times``  every step

There is no official training code, and the paper gives no normaliser. ``joint``: a = b = mean|x - T_w| at t_dm, so
that equal times and noise give DMD2 exactly. ``separate``: a = mean|x - T_c| at t_dm, b the same at t_ca, as in CDM's
code but without its floor of 0.1. ``cleaner`` times are uniform on [0.02, t_student]; CDM's code samples them from 0
and clamps, which is ``ca_times: {within: cleaner, clamp: after}``. The teacher needs both branches of guidance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from fewstep.distill import health, matching
from fewstep.distill.critics import critic_term
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import backward_simulation
from fewstep.distill.stage import MatchingConfig, StageContext
from fewstep.distill.time_laws import CappedTimes, TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, Update
from fewstep.models.guidance import UNGUIDED, Guidance
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform


class DecoupledDMD(MatchingConfig):
    published: ClassVar = {
        "guidance": "8 (SDXL)",
        "ca_times": "cleaner",
        "dm_times": "all",
        "critic_updates": "5 (SDXL)",
        "batch": "128 (SDXL)",
        "student.lr": "5e-7 (SDXL)",
    }
    steps: int = Field(4, ge=1, le=10_000)
    shift: float = Field(1.0, ge=1e-4, le=1e4)
    dm_times: CappedTimes = CappedTimes(within="all")
    ca_times: CappedTimes = CappedTimes(within="cleaner")
    critic_times: TimeLaw = TimeLaw()
    normaliser: Literal["joint", "separate"] = "joint"

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        times = time_uniform(self.steps, self.shift)[:-1]
        guidance = Guidance(self.guidance)
        roles.require_both_branches("teacher", "decoupled_dmd")

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            t_dm, t_ca = (law.capped(micro.random, sample.t_student) for law in (self.dm_times, self.ca_times))
            x_dm, n = matching.renoise(schedule, sample, t_dm, micro.random)
            x_ca, _ = matching.renoise(schedule, sample, t_ca, micro.random)
            joint = self.normaliser == "joint"
            T = roles.predict(
                "teacher", x_dm.detach(), t_dm, sample.condition, guidance=guidance if joint else UNGUIDED
            )
            F = roles.predict("fake", x_dm.detach(), t_dm, sample.condition).out.x0
            T_ca = roles.predict("teacher", x_ca.detach(), t_ca, sample.condition, guidance=guidance)
            dm, ca = T.cond.x0 - F, T_ca.out.x0 - T_ca.cond.x0
            health.observe(micro, schedule, sample, t_dm, n, T, F)
            health.observe_guidance(micro, ca, dm)
            x = sample.output
            if joint:
                yield LossTerm("match", matching.surrogate_loss(x, dm + ca, matching.l1_weight(x, T.out.x0)))
            else:
                yield LossTerm("dm", matching.surrogate_loss(x, dm, matching.l1_weight(x, T.cond.x0)))
                yield LossTerm("ca", matching.surrogate_loss(x, ca, matching.l1_weight(x, T_ca.cond.x0)))

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            t = self.critic_times.sample(micro.random, len(micro.sample.level))
            yield critic_term(micro, roles, t)

        return Objective(
            updates=(
                Update("student", ("student",), student, Every(self.critic_updates)),
                Update("fake", ("fake",), fake),
            ),
            rollout=lambda micro: backward_simulation(micro, roles, times),
            few_step=FewStep(times=times, rule="renoise", shift=self.shift),
        )
