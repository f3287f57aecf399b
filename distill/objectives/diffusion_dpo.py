"""Diffusion-DPO: tune a model on pairs of a preferred and a rejected sample (Wallace et al., arXiv 2311.12908).

Both samples are noised with the same t and the same noise. What counts is how much better than a frozen reference the
policy predicts the winner, compared with how much better it predicts the loser:

    l_i = mean|target - policy(x_i_t)|^2 - mean|target - reference(x_i_t)|^2
    z   = -beta/2 (l_winner - l_loser)              student:  min E softplus(-z)

This follows the released code; in the paper the noises are independent, the error is a sum and beta is constant.
``error`` is the space of the target: ``noise`` (the paper's), ``v``, or ``velocity`` (Flow-DPO, arXiv 2501.13918);
they weight t differently. The reference is a frozen role: ``freeze: {reference: teacher}``, or the student of the
previous stage, to tune a few-step student. Then ``student_times`` lists the student's own times, the only ones at which
it is evaluated in sampling; otherwise it is a law of times. The condition is that of the pair, its label or its prompt.
``guidance`` is only for a network that takes the scale as an input (FLUX.1 dev): the scale at which it is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.transfer import like
from fewstep.distill.matching import per_sample_mean
from fewstep.distill.roles import Roles
from fewstep.distill.stage import MAX_GUIDANCE, MAX_WEIGHT, ObjectiveConfig, StageContext
from fewstep.distill.time_laws import TimeLaw
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.condition import Condition
from fewstep.models.denoiser import expand_like
from fewstep.models.guidance import Guidance
from fewstep.models.prediction import Coefficients

Level = Annotated[float, Field(ge=0, le=1)]


class DiffusionDPO(ObjectiveConfig):
    published: ClassVar = {
        "beta": "2000 or 5000 (SD1.5), 5000 (SDXL), with the noise error",
        "error": "noise",
        "batch": "2048 pairs",
        "student.lr": "2e-5 with warm-up (the launchers' 1e-8 times their scaling)",
    }
    beta: float = Field(100.0, gt=0, le=MAX_WEIGHT)
    error: Literal["noise", "v", "velocity"] = "velocity"
    guidance: float = Field(1.0, ge=0, le=MAX_GUIDANCE)
    student_times: Annotated[tuple[Level, ...], Field(min_length=1)] | TimeLaw = TimeLaw(low=0.001, high=0.999)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student", "reference"})

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"winner", "loser"})

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule, embedded = roles.denoiser("student").schedule, roles.denoiser("student").style.embedded
        if self.guidance != 1 and not embedded:
            raise UserError(
                f"diffusion_dpo: guidance = {self.guidance:g} is for a network that takes the scale as an input; this "
                "one is tuned by its conditional prediction alone, so use 1."
            )

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            size, condition = micro.batch.size, Condition.cat(micro.batch.condition, micro.batch.condition)
            if isinstance(self.student_times, tuple):
                times = torch.tensor(self.student_times, dtype=torch.float64)
                t = times[micro.random.integers(size, len(times))]
            else:
                t = self.student_times.sample(micro.random, size)
            x0 = torch.cat([micro.batch["winner"], micro.batch["loser"]])
            t, noise = t.repeat(2), torch.cat([micro.random.normal(micro.batch["winner"].shape)] * 2)
            c = Coefficients.at(schedule, expand_like(t, x0))
            alpha, sigma, a, b = like(x0, c.alpha, c.sigma, *c.row(self.error))
            x_t, target = alpha * x0 + sigma * noise, a * x0 + b * noise

            def errors(role: str) -> Tensor:
                out = roles.predict(role, x_t, t, condition, guidance=Guidance(self.guidance)).out.view(self.error)
                return per_sample_mean((target - out).square()).flatten()

            policy, reference = errors("student"), errors("reference")
            winner, loser = (policy - reference).chunk(2)
            z = -self.beta / 2 * (winner - loser)
            micro.log("health/accuracy", (z > 0).float())
            micro.log("health/winner_error", policy.chunk(2)[0])  # rises if the likelihood of both samples falls
            yield LossTerm("dpo", F.softplus(-z).mean())

        return Objective(updates=(Update("student", ("student",), student),))
