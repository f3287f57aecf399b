"""CDM: continuous-time distribution matching (arXiv 2605.06376): supervision at all times instead of on one grid.

A rollout takes N ~ U{1..max_steps} deterministic steps over random times 1 = t_1 > ... > t_N (``rollout_times``) and
stops at a random one of them, at the state x_i and time t_i, where the student predicts x0 and the noise e. Three terms
follow, each with its own noise:

    CA    x0 predicted at (x_i, t_i)                        t ~ ``ca_times``, t < t_i    d = (w - 1)(T_c - T_0)
    DM    the same x0                                       t ~ ``renoise_times``        d = T_c - F
    CDM   x0' predicted at (alpha x0 + sigma e, t'),        t ~ ``renoise_times``        d = T_c - F
          on the step's straight line, t' ~ ``student_times``

    student:  min |x - sg(x + d / max(mean|x - T_c|, floor))|^2 for each            every R-th step
    fake:     min E | F(x_t) - x0 |^2 in the network's own prediction type,         every step
              then fake <- fake + blend (student - fake)

As in the released code, and unlike in the paper's text, the squares have no factor 1/2, no gradient flows through the
input of x0', and CA is cleaner than t_i. The release samples ``rollout_times`` as U(.25, .95) before the model's shift;
at Stable Diffusion 3's shift of 3 they lie between .5 and .983, ``{shift: 3, low: 0.5, high: 0.9828}``. It clamps other
times to [.02, .98] (``clamp: after``); by default they are uniform on that range here. The paper's CFG factor a = 7 is
w = 8 here, and the teacher needs both branches of guidance. ``blend`` interpolates parameters, which for LoRA adapters
is not an interpolation of the networks (the release does it nevertheless): it is refused unless both roles are copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import health, matching
from fewstep.distill.critics import critic_term
from fewstep.distill.roles import Roles, blend, require_blendable
from fewstep.distill.rollouts import add_noise, random_time_rollout
from fewstep.distill.stage import MAX_GUIDANCE, MAX_STEPS, MAX_WEIGHT, MatchingConfig, StageContext
from fewstep.distill.time_laws import CappedTimes, RenoiseTimes, TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, StudentSample, Update
from fewstep.models.guidance import Guidance
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform


class CDM(MatchingConfig):
    published: ClassVar = {
        "guidance": "8 (the text's a = 7)",
        "shift": "the model's (3 for SD3)",
        "max_steps": "28",
        "rollout_times": "uniform shifted by 3 on 0.5 to 0.9828 (SD3)",
        "critic_updates": "2",
        "blend": "1e-3",
        "batch": "128 (SD3), 64 (LongCat-Image)",
        "student.lr": "1e-5",
        "fake.lr": "5e-6",
    }
    steps: int = Field(4, ge=1, le=10_000)  # of sampling; training has no grid
    shift: float = Field(1.0, ge=1e-4, le=1e4)  # of sampling
    guidance: float = Field(8.0, ge=0, le=MAX_GUIDANCE)
    max_steps: int = Field(28, ge=1, le=10_000)
    rollout_times: TimeLaw = TimeLaw(low=0.25, high=0.95)
    critic_updates: int = Field(2, ge=1, le=MAX_STEPS)
    blend: float = Field(1e-3, ge=0, le=1)
    floor: float = Field(0.1, gt=0, le=MAX_WEIGHT)
    off_trajectory: float = Field(1.0, ge=0, le=MAX_WEIGHT)
    renoise_times: RenoiseTimes = RenoiseTimes()
    ca_times: CappedTimes = CappedTimes(within="cleaner")
    student_times: RenoiseTimes = RenoiseTimes()
    critic_times: RenoiseTimes = RenoiseTimes()

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        guidance = Guidance(self.guidance)
        roles.require_both_branches("teacher", "cdm")
        if self.blend:
            require_blendable(roles, "fake", "student")

        def surrogate(x: Tensor, direction: Tensor, reference: Tensor) -> Tensor:
            return 2 * matching.surrogate_loss(x, direction, matching.l1_weight(x, reference, self.floor))

        def augmentation(micro: MicroBatch, sample: StudentSample) -> Tensor:
            t = self.ca_times.capped(micro.random, sample.t_student)
            x_t, _ = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t.detach(), t, sample.condition, guidance=guidance)
            return surrogate(sample.output, T.out.x0 - T.cond.x0, T.cond.x0)

        def distribution(micro: MicroBatch, sample: StudentSample) -> Tensor:
            t = self.renoise_times.sample(micro.random, len(sample.level))
            x_t, n = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t.detach(), t, sample.condition)
            F = roles.predict("fake", x_t.detach(), t, sample.condition).out.x0
            if sample is micro.sample:  # the fake does not learn samples off the trajectory
                health.observe(micro, schedule, sample, t, n, T, F)
            return surrogate(sample.output, T.out.x0 - F, T.out.x0)

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            yield LossTerm("ca", augmentation(micro, sample))
            yield LossTerm("dm", distribution(micro, sample))
            if self.off_trajectory:
                t = self.student_times.sample(micro.random, len(sample.level), "off_trajectory")
                assert sample.noise is not None
                x = add_noise(schedule, sample.output.detach(), sample.noise, t)
                x0 = roles.predict("student", x, t, sample.condition).out.x0
                off_trajectory = StudentSample(x0, sample.level, x0, t, sample.condition)
                yield LossTerm("cdm", self.off_trajectory * distribution(micro, off_trajectory))

        def mix(_: KeyedRandom, __: Mapping[str, Tensor]) -> None:
            if self.blend:
                blend(roles["fake"], roles["student"], self.blend)

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            t = self.critic_times.sample(micro.random, len(micro.sample.level))
            yield critic_term(micro, roles, t)

        return Objective(
            updates=(
                Update("fake", ("fake",), fake, after=mix),
                Update("student", ("student",), student, Every(self.critic_updates)),
            ),
            rollout=lambda micro: random_time_rollout(micro, roles, self.max_steps, self.rollout_times),
            few_step=FewStep(times=time_uniform(self.steps, self.shift)[:-1], rule="deterministic", shift=self.shift),
        )
