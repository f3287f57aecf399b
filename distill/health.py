"""What tells a sick run from a healthy one: numbers that training records, and what they mean in plain words.

``observe`` notes, where a student is matched, how teacher and fake differ; ``Probe`` compares samples of the student
with the teacher's; ``diagnose`` reads what was logged of both.

The critic's slope. With F* = E[x0 | x_t] on the student's samples, E<T - x0, T - F> = E<T - F*, T - F> for any F,
so the slope of the regression of T - x0 on T - F is 1 for a fake that is up to date. One that has gone a share q of
the way from the teacher to the student has slope 1 / q: above 1 it lags, near 0 and below it points elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.distill.config import HealthConfig
from fewstep.distill.critics import denoising_target
from fewstep.distill.matching import l1_weight, per_sample_mean
from fewstep.distill.update import Anchor, Micro
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance, Guided
from fewstep.models.schedules import NoiseSchedule
from fewstep.models.store import FewStep, ModelConfig
from fewstep.samplers.grids import time_uniform
from fewstep.samplers.sample import sample
from fewstep.samplers.solvers import SOLVERS, STUDENTS

BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def observe(m: Micro, schedule: NoiseSchedule, a: Anchor, t: Tensor, n: Tensor, teacher: Guided, fake: Tensor) -> None:
    """Notes what a matching update sees at ``x_t`` (``n`` is the bridge's noise, ``fake`` the fake's x0): the gap
    between guided teacher and fake relative to the pull's normaliser, also by time; the critic's slope; the cosine
    of guidance (CA) and distribution matching (DM); the deviation of the samples."""
    gap = (per_sample_mean((teacher.out.x0 - fake).abs()) * l1_weight(a.handle, teacher.out.x0)).flatten()
    m.note("health/gap", gap)
    for low, high in pairwise(BUCKETS):
        inside = ((t > low) & (t <= high)).to(gap)
        m.note(f"health/gap at t {low:g} to {high:g}", gap * inside, inside)
    dm = teacher.cond.x0 - fake
    x0, _, weight = denoising_target(schedule, a, t, n)
    m.note("health/critic_slope", weight * dm * (teacher.cond.x0 - x0), weight * dm.square())
    if teacher.null is not None:
        note_split(m, teacher.out.x0 - teacher.cond.x0, dm)
    m.note("health/sample_sd", a.handle.std())


@torch.no_grad()
def note_split(m: Micro, ca: Tensor, dm: Tensor) -> None:
    """Notes how guidance and distribution matching stand to each other: in balance, cosine -1 and a share of 1/2."""
    ca, dm = ca.flatten(1), dm.flatten(1)
    m.note("health/ca_dm_cosine", F.cosine_similarity(ca, dm))
    m.note("health/ca_share", ca.norm(dim=1), ca.norm(dim=1) + dm.norm(dim=1))


@dataclass(frozen=True)
class Profile:
    """What samples [S, N, C, ...] of S seeds for N conditions are like: mean and deviation of each channel, and the
    distance between seeds."""

    mean: Tensor
    sd: Tensor
    diversity: float

    @staticmethod
    def of(samples: Tensor) -> Profile:
        channels = samples.float().flatten(0, 1).transpose(0, 1).flatten(1)
        rows = samples.float().flatten(2).transpose(0, 1)
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)).mean() / (
            len(samples) * (len(samples) - 1)
        )
        return Profile(channels.mean(1), channels.std(1), apart.item())

    def against(self, teacher: Profile) -> dict[str, float]:
        """Mean drift in the teacher's deviations, and the ratios of deviation and of diversity to the teacher's."""
        return {
            "health/mean_drift": ((self.mean - teacher.mean) / teacher.sd).square().mean().sqrt().item(),
            "health/sd_ratio": (self.sd.mean() / teacher.sd.mean()).item(),
            "health/diversity_ratio": self.diversity / teacher.diversity,
        }


@dataclass(frozen=True)
class Probe:
    """Draws samples for the rows of ``condition`` [conditions], always from the same noise, in the shape of the
    teacher's config ``origin``. The teacher's profile is drawn once for each guidance scale."""

    condition: Condition
    settings: HealthConfig
    origin: ModelConfig
    device: torch.device
    batch: int
    _known: dict[float, Profile] = field(default_factory=dict)

    def __call__(
        self, student: Denoiser, few_step: FewStep | None, teacher: Denoiser, scale: float
    ) -> dict[str, float]:
        """The student's samples against those of the teacher with guidance ``scale``, each by its own few-step rule; a
        model without one (a teacher, a tuned teacher) takes ``teacher_steps`` steps of Heun's."""
        if scale not in self._known:
            self._known[scale] = self._profile(teacher, self.origin.few_step, scale)
        return self._profile(student, few_step, scale).against(self._known[scale])

    def _profile(self, denoiser: Denoiser, few_step: FewStep | None, scale: float) -> Profile:
        settings, condition = self.settings, self.condition
        rule, times = SOLVERS["heun"], time_uniform(settings.teacher_steps, self.origin.shift)
        if few_step is not None:
            rule, times, scale = STUDENTS[few_step.rule], (*few_step.times, 0.0), 1.0
            if few_step.counts:
                told = torch.full((settings.conditions,), len(few_step.times), device=self.device)
                condition = condition.replace(steps=told)
        rows = torch.arange(settings.conditions, device=self.device).repeat(settings.seeds)
        samples = sample(
            denoiser, condition.index(rows), self.origin.shape, len(rows), rule=rule, times=times,
            guidance=Guidance(scale), batch=self.batch, device=self.device,
        )  # fmt: skip
        return Profile.of(samples.x0.reshape(settings.seeds, settings.conditions, *self.origin.shape))


WINDOW = 20  # logged lines that a diagnosis looks back on
ENOUGH = 5  # values of a quantity without which it says nothing


class Finding(NamedTuple):
    """Something that looks wrong: a short name, and a sentence with the numbers, their meaning and what helps."""

    name: str
    text: str


def diagnose(logged: Sequence[Mapping[str, float]]) -> list[Finding]:
    """What the last lines of a log say about a run's health; empty where nothing looks wrong.

    The thresholds lie between runs that were made sick on purpose and healthy ones (tests/distill/test_health.py,
    results/health); they are hints, not verdicts.
    """

    def values(name: str) -> list[float]:
        return [line[f"health/{name}"] for line in logged[-WINDOW:] if f"health/{name}" in line]

    def latest(name: str) -> float:
        return next((line[f"health/{name}"] for line in reversed(logged) if f"health/{name}" in line), math.nan)

    found = []
    if (diversity := latest("diversity_ratio")) < 0.5:
        text = f"samples of one condition differ {diversity:.2f} times as much as the teacher's: the student collapses"
        found.append(Finding("collapse", f"{text}. More critic updates or a lower student rate keep modes."))
    if (ratio := latest("sd_ratio")) > 1.25 or ratio < 0.75:
        what = "saturate" if ratio > 1 else "wash out"
        text = f"the deviation of the samples is {ratio:.2f} times the teacher's: they {what}"
        found.append(Finding("contrast", f"{text}. Look at guidance and at the student's rate."))
    if (drift := latest("mean_drift")) > 0.5:
        text = f"the mean of the samples is {drift:.2f} deviations away from the teacher's"
        found.append(Finding("drift", f"{text}: lower the student's rate, or give the critic more updates."))
    shares = values("ca_share")
    too_guided = len(shares) >= ENOUGH and statistics.median(shares) > 0.75
    if too_guided:
        text = f"guidance makes {statistics.median(shares):.0%} of the direction and matching does not balance it"
        found.append(Finding("guidance", f"{text}: lower guidance, or give the critic more updates."))
    slopes, deviations = values("critic_slope"), values("sample_sd")
    slope = statistics.median(slopes) if len(slopes) >= ENOUGH else 1.0
    swing = statistics.pstdev(deviations) / statistics.mean(deviations) if len(deviations) >= ENOUGH else 0.0
    if slope > 1.6 or (swing > 0.12 and not too_guided):
        text = f"the critic's slope is {slope:.2f} (1 is up to date) and the samples' deviation swings by {swing:.0%}"
        found.append(Finding("critic", f"{text}: the fake score lags; raise its rate or critic_updates."))
    for update in sorted({name for line in logged[-WINDOW:] for name in line if name.startswith("grad_norm/")}):
        norms = [line[update] for line in logged[-WINDOW:] if update in line]
        if len(norms) >= ENOUGH and norms[-1] > 10 * statistics.median(norms):
            text = f"the last {update} is {norms[-1] / statistics.median(norms):.0f} times its median"
            found.append(Finding("gradient", f"{text}: one more sign of a rate that is too high."))
    return found
