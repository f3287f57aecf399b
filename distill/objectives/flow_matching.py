"""Flow matching: train a network on data from scratch, to be a teacher (Lipman et al., arXiv 2210.02747).

    L = E_{x0, noise, t} | velocity_theta(x_t, t, c) - velocity |^2,   x_t = alpha x0 + sigma noise

or the same in the network's own prediction type (noise, v). The condition is dropped at random so that the network also
learns the unconditional field that guidance needs. ``student_times`` is the law of ``t``: uniform, or ``{kind:
logit_normal}`` as in Stable Diffusion 3 (Esser et al., arXiv 2403.03206), possibly with a larger ``std`` than theirs:
distillation also evaluates the teacher near ``t = 1``, which a deviation of 1 rarely reaches. With ``times_per_frame``
each frame of a video has its own time (Diffusion Forcing, arXiv 2407.01392): a causal network that also learns from
frames with little noise can generate one frame after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.transfer import like
from fewstep.distill.roles import Roles
from fewstep.distill.stage import ObjectiveConfig, StageContext
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, expand_like
from fewstep.models.prediction import Coefficients


class FlowMatching(ObjectiveConfig):
    drop_condition: float = Field(0.1, ge=0, le=1)
    student_times: TimeLaw = TimeLaw()
    times_per_frame: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student"})

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"x0"})

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        if self.times_per_frame and len(shape) != 4:
            raise UserError("times_per_frame: true needs videos, [C, F, H, W].")
        return {}

    def condition(self, micro: MicroBatch, t: Tensor) -> Condition:
        """The condition of a batch at times ``t``, of some samples dropped. A subclass may change it further."""
        dropped = micro.random.uniform(micro.batch.size, stream="drop") < self.drop_condition
        return micro.batch.condition.null(dropped)

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("student").schedule

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            x0 = micro.batch["x0"]
            if self.times_per_frame:
                size, frames = x0.shape[0], x0.shape[2]
                t = self.student_times.sample(micro.random, size * frames).reshape(size, 1, frames, 1, 1)
            else:
                t = self.student_times.sample(micro.random, len(x0))
            noise = micro.random.normal(x0.shape)
            c = Coefficients.at(schedule, expand_like(t, x0))
            alpha, sigma = like(x0, c.alpha, c.sigma)
            x_t = alpha * x0 + sigma * noise
            out = roles.predict("student", x_t, t, self.condition(micro, t)).out
            a, b = like(x0, *c.row(out.kind))
            target = a * x0 + b * noise
            yield LossTerm("flow_matching", (out.raw - target).square().mean())

        return Objective(updates=(Update("student", ("student",), student),))
