"""Decoupled DMD: guidance and distribution matching, each at its own time (arXiv 2511.22677).

The guided direction of DMD2 is a sum, T_w - F = (T_c - F) + (w - 1)(T_c - T_0): distribution matching (DM), which
keeps the student in the teacher's law, and CFG augmentation (CA), which does the work of making a few steps enough and
does not see the student. The paper reads them at different times; its best, the default here, is the hybrid

    t_dm ~ U(0, 1)          t_ca ~ U(0, t_in), no noisier than the step that made the sample

    student:  min 1/2 | x - sg(x + DM(x_t_dm) / a + CA(x_t_ca) / b) |^2                       every R-th step
    fake:     min E | F(x_t) - x |^2 in the network's own prediction type, t ~ U(0, 1)        every step

There is no official training code, and the paper gives no normaliser. ``joint``: a = b = mean|x - T_w| at t_dm, so
that equal times and noise give DMD2 exactly. ``separate``: a = mean|x - T_c| at t_dm, b the same at t_ca (as CDM's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fewstep.distill import health, matching
from fewstep.distill.critics import denoising_loss
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import renoise_simulation
from fewstep.distill.stage import MatchingConfig
from fewstep.distill.update import Anchor, Due, Micro, Objective, Term, Update
from fewstep.models.guidance import OFF, Guidance
from fewstep.models.store import FewStep
from fewstep.samplers.grids import time_uniform

Times = Literal["all", "cleaner"]


class Config(MatchingConfig):
    published: ClassVar = {
        "guidance": "8 (SDXL)",
        "ca_times": "cleaner",
        "dm_times": "all",
        "critic_updates": "5 (SDXL)",
        "batch": "128 (SDXL)",
        "student.lr": "5e-7 (SDXL)",
    }
    name: Literal["decoupled_dmd"] = "decoupled_dmd"
    steps: int = Field(4, ge=1)
    shift: float = Field(1.0, gt=0)
    dm_times: Times = "all"
    ca_times: Times = "cleaner"
    normaliser: Literal["joint", "separate"] = "joint"
    t_range: tuple[float, float] = (0.02, 0.98)


def build(config: Config, roles: Roles) -> Objective:
    schedule = roles.denoiser("teacher").schedule
    times = time_uniform(config.steps, config.shift)[:-1]
    guidance = Guidance(config.guidance)
    low, high = config.t_range

    def draw(m: Micro, a: Anchor, times: Times) -> Tensor:
        top = a.t_in.clamp(low, high) if times == "cleaner" else high
        return low + m.draws.uniform(len(a.s)) * (top - low)

    def student(m: Micro) -> Iterator[Term]:
        a = m.sample
        t_dm, t_ca = draw(m, a, config.dm_times), draw(m, a, config.ca_times)
        x_dm, n = matching.renoise(schedule, a, t_dm, m.draws)
        x_ca, _ = matching.renoise(schedule, a, t_ca, m.draws)
        joint = config.normaliser == "joint"
        T = roles.read("teacher", x_dm.detach(), t_dm, a.condition, guidance=guidance if joint else OFF)
        F = roles.read("fake", x_dm.detach(), t_dm, a.condition).out.x0
        C = roles.read("teacher", x_ca.detach(), t_ca, a.condition, guidance=guidance)
        dm, ca = T.cond.x0 - F, C.out.x0 - C.cond.x0
        health.observe(m, schedule, a, t_dm, n, T, F)
        health.note_split(m, ca, dm)
        if joint:
            yield Term("match", matching.pull(a.handle, dm + ca, matching.l1_weight(a.handle, T.out.x0)))
        else:
            yield Term("dm", matching.pull(a.handle, dm, matching.l1_weight(a.handle, T.cond.x0)))
            yield Term("ca", matching.pull(a.handle, ca, matching.l1_weight(a.handle, C.cond.x0)))

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
        rollout=lambda m: renoise_simulation(m, roles, times),
        few_step=FewStep(times=times, rule="renoise", shift=config.shift),
    )
