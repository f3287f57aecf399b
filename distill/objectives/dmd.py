"""DMD: one-step distribution matching with a regression on the teacher's own samples (Yin et al., arXiv 2311.18828).

The student maps noise to x0 in one step. Its x0 is noised to t ~ ``renoise_times`` and moved along the difference of
the guided teacher and the fake score. On known pairs, it must also map the noise to the end y of the teacher's ODE:

    student:  min 1/2 | x - sg(x + k (T_w(x_t) - F(x_t))) |^2 + regression |x(noise) - y|^2,  k = 1 / mean|x - T_w(x_t)|
    fake:     min E | F(x_t) - x |^2 in the network's own prediction type, t ~ ``critic_times``

``fewstep data ode-pairs`` creates the pairs (``data.kind: tensors``); ``regression: 0`` needs none. Two differences
from the paper: the distance is the mean square instead of LPIPS, whose weights are not available here, and, as in every
published code, the factor alpha_t of the paper's weight is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from fewstep.distill import health, matching
from fewstep.distill.critics import critic_term
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import backward_simulation
from fewstep.distill.stage import MAX_STEPS, MAX_WEIGHT, MatchingConfig, StageContext
from fewstep.distill.time_laws import RenoiseTimes, TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, Update
from fewstep.models.guidance import Guidance
from fewstep.models.model_config import FewStep


class DMD(MatchingConfig):
    published: ClassVar = {
        "guidance": "none (CIFAR-10, ImageNet-64), 3 or 8 (SD1.5)",
        "regression": "0.25 (0.5 unconditional), LPIPS",
        "critic_updates": "1",
        "batch": "392 (CIFAR-10), 2304 (SD1.5)",
        "student.lr": "5e-5 (CIFAR-10), 2e-6 (ImageNet-64), 1e-5 (SD1.5)",
    }
    regression: float = Field(0.25, ge=0, le=MAX_WEIGHT)
    critic_updates: int = Field(1, ge=1, le=MAX_STEPS)
    renoise_times: RenoiseTimes = RenoiseTimes()
    critic_times: TimeLaw = TimeLaw()

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"noise", "x0"} if self.regression else ())

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        guidance = Guidance(self.guidance)

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            t = self.renoise_times.sample(micro.random, len(sample.level))
            x_t, n = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t.detach(), t, sample.condition, guidance=guidance)
            F = roles.predict("fake", x_t.detach(), t, sample.condition).out.x0
            health.observe(micro, schedule, sample, t, n, T, F)
            weight = matching.l1_weight(sample.output, T.out.x0)
            yield LossTerm("match", matching.surrogate_loss(sample.output, T.out.x0 - F, weight))
            if self.regression:
                x = roles.predict("student", micro.batch["noise"], 1.0, micro.batch.condition).out.x0
                yield LossTerm("regression", self.regression * (x - micro.batch["x0"]).square().mean())

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            t = self.critic_times.sample(micro.random, len(micro.sample.level))
            yield critic_term(micro, roles, t)

        return Objective(
            updates=(
                Update("student", ("student",), student, Every(self.critic_updates)),
                Update("fake", ("fake",), fake),
            ),
            rollout=lambda micro: backward_simulation(micro, roles, (1.0,)),
            few_step=FewStep(times=(1.0,), rule="renoise"),
        )
