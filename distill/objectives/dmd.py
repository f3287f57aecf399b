"""DMD: one-step distribution matching with a regression on the teacher's own samples (Yin et al., arXiv 2311.18828).

The student maps noise to x0 in one step. Its x0 is noised to t ~ U(.02, .98) and moved along the difference of the
guided teacher and the fake score; besides, it must map the noise of known pairs to what the teacher's ODE makes of it:

    student:  min 1/2 | x - sg(x + k (T_w(x_t) - F(x_t))) |^2 + regression |x(noise) - y|^2,  k = 1 / mean|x - T_w(x_t)|
    fake:     min E | F(x_t) - x |^2 in the network's own prediction type, t ~ U(0, 1)

``fewstep pairs`` makes the pairs (``data.kind: tensors``); ``regression: 0`` needs none. Two differences: the distance
is the mean square (the paper's LPIPS needs weights that are not here), and, as in every published code, the factor
alpha_t that the paper's weight leaves is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from fewstep.distill import health, matching
from fewstep.distill.critics import denoising_loss
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import renoise_simulation
from fewstep.distill.stage import MatchingConfig
from fewstep.distill.update import Due, Micro, Objective, Term, Update
from fewstep.models.guidance import Guidance
from fewstep.models.store import FewStep


class Config(MatchingConfig):
    published: ClassVar = {
        "guidance": "none (CIFAR-10, ImageNet-64), 3 or 8 (SD1.5)",
        "regression": "0.25 (0.5 unconditional), LPIPS",
        "critic_updates": "1",
        "batch": "392 (CIFAR-10), 2304 (SD1.5)",
        "student.lr": "5e-5 (CIFAR-10), 2e-6 (ImageNet-64), 1e-5 (SD1.5)",
    }
    name: Literal["dmd"] = "dmd"
    regression: float = Field(0.25, ge=0)
    critic_updates: int = Field(1, ge=1)
    t_range: tuple[float, float] = (0.02, 0.98)

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"noise", "x0"} if self.regression else ())


def build(config: Config, roles: Roles) -> Objective:
    schedule = roles.denoiser("teacher").schedule
    guidance = Guidance(config.guidance)

    def student(m: Micro) -> Iterator[Term]:
        a = m.sample
        t = m.draws.uniform(len(a.s), *config.t_range)
        x_t, n = matching.renoise(schedule, a, t, m.draws)
        T = roles.read("teacher", x_t.detach(), t, a.condition, guidance=guidance)
        F = roles.read("fake", x_t.detach(), t, a.condition).out.x0
        health.observe(m, schedule, a, t, n, T, F)
        yield Term("match", matching.pull(a.handle, T.out.x0 - F, matching.l1_weight(a.handle, T.out.x0)))
        if config.regression:
            x = roles.read("student", m.batch["noise"], 1.0, m.batch.condition).out.x0
            yield Term("regression", config.regression * (x - m.batch["x0"]).square().mean())

    def fake(m: Micro) -> Iterator[Term]:
        a = m.sample
        t = m.draws.uniform(len(a.s))
        x_t, n = matching.renoise(schedule, a, t, m.draws)
        yield Term("critic", denoising_loss(roles.read("fake", x_t, t, a.condition).out, schedule, a, t, n))

    return Objective(
        updates=(
            Update("student", ("student",), student, Due(every=config.critic_updates)),
            Update("fake", ("fake",), fake),
        ),
        rollout=lambda m: renoise_simulation(m, roles, (1.0,)),
        few_step=FewStep(times=(1.0,), rule="renoise"),
    )
