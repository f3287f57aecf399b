"""CDM: continuous-time distribution matching (arXiv 2605.06376): supervision at all times, not on one grid.

A rollout walks a random number N ~ U{1..max_steps} of deterministic steps over random times 1 = t_1 > ... > t_N, and
stops at a random one of them: (x_i, t_i), with the prediction x0 and its noise e. Three terms, renoised anew in each:

    CA    x0 read at (x_i, t_i)       t ~ U(0, t_i)     along  (w - 1)(T_c - T_0)
    DM    the same x0                 t ~ U(0, 1)       along  T_c - F
    CDM   x0' read at (x', t'), t' ~ U(0, 1), where the step's straight line x' = alpha x0 + sigma e (no gradient) leads
                                      t ~ U(0, 1)       along  T_c - F

with min |x - sg(x + d / max(mean|x - T_c|, floor))|^2. The fake learns from x0 at every step, and then moves towards
the student by ``blend``; the student learns every second step. As in the released code, and unlike the text, the
squares carry no 1/2 and no gradient runs through x'. The paper's CFG factor a = 7 is w = 8 here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fewstep.distill import health, matching
from fewstep.distill.critics import denoising_loss
from fewstep.distill.roles import Roles, blend
from fewstep.distill.rollouts import noised, random_ode
from fewstep.distill.stage import MatchingConfig
from fewstep.distill.update import Anchor, Due, Micro, Objective, Term, Update
from fewstep.models.guidance import Guidance
from fewstep.models.store import FewStep
from fewstep.samplers.grids import time_uniform


class Config(MatchingConfig):
    published: ClassVar = {
        "guidance": "8 (the text's a = 7)",
        "shift": "the model's (3 for SD3), in sampling",
        "max_steps": "28",
        "inner": "(0.25, 0.95)",
        "critic_updates": "2",
        "blend": "1e-3",
        "batch": "128 (SD3), 64 (LongCat-Image)",
        "student.lr": "1e-5",
        "fake.lr": "5e-6",
    }
    name: Literal["cdm"] = "cdm"
    steps: int = Field(4, ge=1)  # of sampling; training has no grid
    shift: float = Field(1.0, gt=0)  # of sampling; the published ``inner`` suits a shift of 3
    guidance: float = 8.0
    max_steps: int = Field(28, ge=1)
    inner: tuple[float, float] = (0.25, 0.95)
    critic_updates: int = Field(2, ge=1)
    blend: float = Field(1e-3, ge=0, le=1)
    floor: float = Field(0.1, gt=0)
    off_trajectory: float = Field(1.0, ge=0)
    t_range: tuple[float, float] = (0.02, 0.98)


def build(config: Config, roles: Roles) -> Objective:
    schedule = roles.denoiser("teacher").schedule
    guidance = Guidance(config.guidance)
    low, high = config.t_range

    def moved(x: Tensor, direction: Tensor, reference: Tensor) -> Tensor:
        return 2 * matching.pull(x, direction, matching.l1_weight(x, reference, config.floor))

    def augmentation(m: Micro, a: Anchor) -> Tensor:
        t = low + m.draws.uniform(len(a.s)) * (a.t_in.clamp(low, high) - low)
        x_t, _ = matching.renoise(schedule, a, t, m.draws)
        T = roles.read("teacher", x_t.detach(), t, a.condition, guidance=guidance)
        return moved(a.handle, T.out.x0 - T.cond.x0, T.cond.x0)

    def distribution(m: Micro, a: Anchor) -> Tensor:
        t = m.draws.uniform(len(a.s), low, high)
        x_t, n = matching.renoise(schedule, a, t, m.draws)
        T = roles.read("teacher", x_t.detach(), t, a.condition)
        F = roles.read("fake", x_t.detach(), t, a.condition).out.x0
        if a is m.sample:  # the fake does not learn what lies off the trajectory
            health.observe(m, schedule, a, t, n, T, F)
        return moved(a.handle, T.out.x0 - F, T.out.x0)

    def student(m: Micro) -> Iterator[Term]:
        a = m.sample
        yield Term("ca", augmentation(m, a))
        yield Term("dm", distribution(m, a))
        if config.off_trajectory:
            t = m.draws.uniform(len(a.s), low, high, "off_trajectory")
            assert a.noise is not None
            x = noised(schedule, a.handle.detach(), a.noise, t)
            x0 = roles.read("student", x, t, a.condition).out.x0
            yield Term("cdm", config.off_trajectory * distribution(m, Anchor(x0, a.s, x0, t, a.condition)))

    def fake(m: Micro) -> Iterator[Term]:
        a = m.sample
        t = m.draws.uniform(len(a.s), low, high)
        x_t, n = matching.renoise(schedule, a, t, m.draws)
        yield Term("critic", denoising_loss(roles.read("fake", x_t, t, a.condition).out, schedule, a, t, n))

    return Objective(
        updates=(
            Update("fake", ("fake",), fake, after=lambda draws: blend(roles["fake"], roles["student"], config.blend)),
            Update("student", ("student",), student, Due(every=config.critic_updates)),
        ),
        rollout=lambda m: random_ode(m, roles, config.max_steps, config.inner),
        few_step=FewStep(times=time_uniform(config.steps, config.shift)[:-1], rule="deterministic", shift=config.shift),
    )
