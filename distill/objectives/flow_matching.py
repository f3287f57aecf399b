"""Flow matching: train a network on data from scratch, to be a teacher (Lipman et al., arXiv 2210.02747).

    L = E_{x0, noise, t} | velocity_theta(x_t, t, c) - velocity |^2,   x_t = alpha x0 + sigma noise

or the same in the network's own prediction type (noise, v). The condition is dropped at random so that the network also
learns the unconditional field that guidance needs. ``student_times`` is the law of ``t``: uniform, or ``{kind:
logit_normal}`` as in Stable Diffusion 3 (Esser et al., arXiv 2403.03206), possibly with a larger ``std`` than theirs:
distillation also evaluates the teacher near ``t = 1``, which a deviation of 1 rarely reaches.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from fewstep.core.transfer import like
from fewstep.distill.roles import Roles
from fewstep.distill.stage import ObjectiveConfig, StageContext
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import expand_like
from fewstep.models.prediction import Coefficients


class FlowMatching(ObjectiveConfig):
    drop_condition: float = Field(0.1, ge=0, le=1)
    student_times: TimeLaw = TimeLaw()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student"})

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"x0"})

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("student").schedule

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            x0 = micro.batch["x0"]
            t = self.student_times.sample(micro.random, len(x0))
            noise = micro.random.normal(x0.shape)
            c = Coefficients.at(schedule, expand_like(t, x0))
            alpha, sigma = like(x0, c.alpha, c.sigma)
            x_t = alpha * x0 + sigma * noise
            dropped = micro.random.uniform(len(x0), stream="drop") < self.drop_condition
            out = roles.predict("student", x_t, t, micro.batch.condition.null(dropped)).out
            a, b = like(x0, *c.row(out.kind))
            target = a * x0 + b * noise
            yield LossTerm("flow_matching", (out.raw - target).square().mean())

        return Objective(updates=(Update("student", ("student",), student),))
