"""Numbers that distinguish a healthy run from one that fails quietly; ``eval.report.diagnosis`` explains them.

``observe`` records how teacher and fake differ where a student is matched; ``Probe`` compares samples of the student
with the teacher's.

The critic's slope. With F* = E[x0 | x_t] on the student's samples, E<T - x0, T - F> = E<T - F*, T - F> for any F,
so the slope of the regression of T - x0 on T - F is 1 for a fake that is up to date. One that has gone a share q of
the way from the teacher to the student has slope 1 / q: above 1 it lags, near 0 and below it points elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.distill.config import HealthConfig
from fewstep.distill.critics import denoising_target
from fewstep.distill.matching import l1_weight, per_sample_mean
from fewstep.distill.update import MicroBatch, StudentSample
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guided
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig

BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def observe(
    micro: MicroBatch,
    schedule: NoiseSchedule,
    sample: StudentSample,
    t: Tensor,
    n: Tensor,
    teacher: Guided,
    fake: Tensor,
) -> None:
    """Notes what a matching update sees at ``x_t`` (``n`` is the bridge's noise, ``fake`` the fake's x0): the gap
    between guided teacher and fake relative to the pull's normaliser, also by time; the critic's slope; the cosine
    of guidance (CA) and distribution matching (DM); the deviation of the samples."""
    gap = (per_sample_mean((teacher.out.x0 - fake).abs()) * l1_weight(sample.output, teacher.out.x0)).flatten()
    micro.log("health/gap", gap)
    for low, high in pairwise(BUCKETS):
        inside = ((t > low) & (t <= high)).to(gap)
        micro.log(f"health/gap at t {low:g} to {high:g}", gap * inside, inside)
    dm = teacher.cond.x0 - fake
    x0, _, weight = denoising_target(schedule, sample, t, n)
    micro.log("health/critic_slope", weight * dm * (teacher.cond.x0 - x0), weight * dm.square())
    if teacher.null is not None:
        note_split(micro, teacher.out.x0 - teacher.cond.x0, dm)
    micro.log("health/sample_sd", sample.output.std())


@torch.no_grad()
def note_split(micro: MicroBatch, ca: Tensor, dm: Tensor) -> None:
    """Notes how guidance and distribution matching stand to each other: in balance, cosine -1 and a share of 1/2."""
    ca, dm = ca.flatten(1), dm.flatten(1)
    micro.log("health/ca_dm_cosine", F.cosine_similarity(ca, dm))
    micro.log("health/ca_share", ca.norm(dim=1), ca.norm(dim=1) + dm.norm(dim=1))


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
    """Generates samples for the rows of ``condition`` [conditions], always from the same noise. The teacher's profile,
    of the model config ``origin``, is computed once per guidance scale."""

    condition: Condition
    settings: HealthConfig
    origin: ModelConfig
    batch: int
    _teachers: dict[float, Profile] = field(default_factory=dict)

    def __call__(self, student: Model, teacher: Denoiser, scale: float) -> dict[str, float]:
        """The student's samples against those of the teacher with guidance ``scale``, each by its own few-step rule; a
        model without one (a teacher, a tuned teacher) takes ``teacher_steps`` Heun steps."""
        if scale not in self._teachers:
            self._teachers[scale] = self._profile(Model(denoiser=teacher, config=self.origin), scale)
        return self._profile(student, scale).against(self._teachers[scale])

    def _profile(self, model: Model, scale: float) -> Profile:
        settings, shape = self.settings, self.origin.shape
        rows = torch.arange(settings.conditions).repeat(settings.seeds)
        few_step = model.config.few_step
        config = SamplingConfig() if few_step else SamplingConfig("heun", settings.teacher_steps, scale)
        condition = self.condition.index(rows)
        samples = generate(model, condition, config, numbers=range(len(rows)), batch=self.batch)
        return Profile.of(samples.x0.reshape(settings.seeds, settings.conditions, *shape))
