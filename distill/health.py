"""Numbers that distinguish a healthy run from one that fails silently; ``eval.report.diagnosis`` interprets them.

``observe`` logs how teacher and fake differ on the student's samples; ``Probe`` compares samples of the student with
those of the teacher.

The critic's slope: with F* = E[x0 | x_t] on the student's samples, E<T - x0, T - F> = E<T - F*, T - F> for any F, so
the slope of the regression of T - x0 on T - F is 1 for a fake that is up to date. A fake that has covered a share q of
the distance from the teacher to the student has slope 1 / q: above 1 it lags; near 0 or below, its direction is wrong.
Samples at which fake and teacher differ by rounding alone do not count; when a fake starts as the teacher's copy, these
are all, and no slope is logged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.transfer import like
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
    micro: MicroBatch, schedule: NoiseSchedule, sample: StudentSample, t: Tensor, n: Tensor, teacher: Guided,
    fake: Tensor,
) -> None:  # fmt: skip
    """Logs the state of a matching update at ``x_t`` (``n`` is the bridge's noise, ``fake`` the fake's x0): the gap
    between guided teacher and fake relative to the L1 normaliser, also by time; the critic's slope; the cosine between
    guidance (CA) and distribution matching (DM); the standard deviation of the samples."""
    gap = (per_sample_mean((teacher.out.x0 - fake).abs()) * l1_weight(sample.output, teacher.out.x0)).flatten()
    micro.log("health/gap", gap)
    buckets = list(pairwise(BUCKETS))
    inside_each = like(gap, *((t > low) & (t <= high) for low, high in buckets))
    for (low, high), inside in zip(buckets, inside_each, strict=True):
        micro.log(f"health/gap at t {low:g} to {high:g}", gap * inside, inside)
    dm = teacher.cond.x0 - fake
    x0, _, weight = denoising_target(schedule, sample, t, n)
    rounding = 4 * torch.finfo(micro.roles.precision).eps
    scale = per_sample_mean(teacher.cond.x0.square() + sample.output.square())
    weight = weight * (per_sample_mean(dm.square()) > rounding**2 * scale)
    micro.log("health/critic_slope", weight * dm * (teacher.cond.x0 - x0), weight * dm.square())
    if teacher.null is not None:
        observe_guidance(micro, teacher.out.x0 - teacher.cond.x0, dm)
    micro.log("health/sample_sd", sample.output.std())


@torch.no_grad()
def observe_guidance(micro: MicroBatch, ca: Tensor, dm: Tensor) -> None:
    """Logs how guidance and distribution matching relate: in balance, the cosine is -1 and the share 1/2."""
    ca, dm = ca.flatten(1), dm.flatten(1)
    micro.log("health/ca_dm_cosine", F.cosine_similarity(ca, dm))
    micro.log("health/ca_share", ca.norm(dim=1), ca.norm(dim=1) + dm.norm(dim=1))


@dataclass(frozen=True)
class Profile:
    """Statistics of samples [S, N, C, ...] of S seeds for N conditions: mean and standard deviation per channel, and
    the mean distance between seeds."""

    mean: Tensor
    sd: Tensor
    diversity: float

    @staticmethod
    def of(samples: Tensor) -> Profile:
        channels = samples.float().flatten(0, 1).transpose(0, 1).flatten(1)
        rows = samples.float().flatten(2).transpose(0, 1)
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)).mean()
        pairs = len(samples) * (len(samples) - 1)
        return Profile(channels.mean(1), channels.std(1), (distances / pairs).item())

    def relative_to(self, teacher: Profile) -> dict[str, float]:
        """The drift of the mean in standard deviations of the teacher, and the ratios of deviation and diversity."""
        return {
            "health/mean_drift": ((self.mean - teacher.mean) / teacher.sd).square().mean().sqrt().item(),
            "health/sd_ratio": (self.sd.mean() / teacher.sd.mean()).item(),
            "health/diversity_ratio": self.diversity / teacher.diversity,
        }


@dataclass(frozen=True)
class Probe:
    """Generates samples for the rows of ``condition`` [conditions], always from the same noise. The profile of the
    teacher, whose model config is ``teacher_config``, is computed once per guidance scale."""

    condition: Condition
    settings: HealthConfig
    teacher_config: ModelConfig
    batch: int
    _teacher_profiles: dict[float, Profile] = field(default_factory=dict)

    def __call__(self, student: Model, teacher: Denoiser, scale: float) -> dict[str, float]:
        """Compares samples of the student with those of the teacher with guidance ``scale``. A model with a few-step
        rule is sampled by it, any other (a teacher, a tuned teacher) by ``teacher_steps`` Heun steps."""
        if scale not in self._teacher_profiles:
            self._teacher_profiles[scale] = self._profile(Model(denoiser=teacher, config=self.teacher_config), scale)
        return self._profile(student, scale).relative_to(self._teacher_profiles[scale])

    def _profile(self, model: Model, scale: float) -> Profile:
        settings, shape = self.settings, self.teacher_config.shape
        rows = torch.arange(settings.conditions).repeat(settings.seeds)
        few_step = model.config.few_step
        config = SamplingConfig() if few_step else SamplingConfig("heun", settings.teacher_steps, scale)
        condition = self.condition.index(rows)
        samples = generate(model, condition, config, numbers=range(len(rows)), batch=self.batch)
        return Profile.of(samples.x0.reshape(settings.seeds, settings.conditions, *shape))
