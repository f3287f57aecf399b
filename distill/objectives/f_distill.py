"""f-distill: one-step or few-step distillation with any f-divergence (arXiv 2502.15681).

The gradient of D_f(p | q) is that of the reverse KL (DMD2's) with one weight per sample, h(r) = f''(r) r^2, at the
density ratio r = p / q of real to generated samples at x_t, which a discriminator estimates. An increasing h gives more
weight to regions that the data cover: less mode seeking.

    student:  min 1/2 | x - sg(x + k h (T_w(x_t) - F(x_t))) |^2 + gan_weight softplus(-D(x_t))
              with k = 1 / mean|x - T_w(x_t)|
    fake:     min E | F(x_t) - x |^2           discriminator:  min softplus(D(x_t)) + softplus(-D(real_t))

r is divided by its mean over similar times (ten bins; its expectation under q is 1 at every t) and h by its mean, so
that the step size does not depend on the divergence. Both are running means over the batches of the steps before, of
all micro-batches and processes: so the size of a micro-batch does not matter. The released code has them of the current
batch, of 512 and more. The features are the frozen teacher's, which the paper finds the most stable. With an
uninformative discriminator this is DMD2. Real images are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.transfer import send
from fewstep.distill import health, matching
from fewstep.distill.adversarial import Heads, density_ratio, discriminator_loss, generator_loss
from fewstep.distill.critics import critic_term
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import add_noise, backward_simulation
from fewstep.distill.stage import MAX_WEIGHT, MatchingConfig, StageContext
from fewstep.distill.time_laws import RenoiseTimes, TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, Update
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, expand_like
from fewstep.models.guidance import Guidance
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": torch.sqrt,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}


class RunningMean:
    """The mean of a number in each of several groups over all batches so far; a batch counts ``decay`` times as much as
    the next one. ``sums`` [2, groups] are weighted totals and counts; at the ``start``, that mean counts as one number.
    """

    def __init__(self, name: str, start: Tensor, decay: float) -> None:
        self.name = name
        self.decay = decay
        self.sums = torch.stack([start, torch.ones_like(start)])

    def normalise(self, micro: MicroBatch, value: Tensor, group: Tensor) -> Tensor:
        """``value`` [B] divided by the means of its groups [B]; ``update`` will add it to them."""
        both = torch.stack([value, torch.ones_like(value)])
        micro.total(self.name, torch.zeros_like(self.sums).index_add_(1, group, both))
        return value / (self.sums[0] / self.sums[1])[group]

    def update(self, totals: Mapping[str, Tensor]) -> None:
        self.sums.mul_(self.decay).add_(totals[self.name])


class FDistill(MatchingConfig):
    published: ClassVar = {
        "divergence": "forward_kl (CIFAR-10), jensen_shannon (others)",
        "guidance": "none (CIFAR-10, ImageNet-64), 1.75 (SD1.5)",
        "critic_updates": "5, 10 (SD1.5)",
        "gan_weight": "1e-3, 3e-3 (ImageNet-64)",
        "decay": "0, 0.5 (ImageNet-64), with the current batch",
        "batch": "2048 (CIFAR-10), 512 (ImageNet-64)",
        "student.lr": "1e-4 (CIFAR-10), 2e-6 (ImageNet-64), 1e-5 (SD1.5)",
    }
    divergence: Literal[
        "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys", "neyman"
    ] = "jensen_shannon"
    steps: int = Field(1, ge=1, le=10_000)
    shift: float = Field(1.0, ge=1e-4, le=1e4)
    renoise_times: RenoiseTimes = RenoiseTimes()  # of the student and of the discriminator
    critic_times: TimeLaw = TimeLaw()
    bins: int = Field(10, ge=1, le=10_000)
    decay: float = Field(0.9, ge=0, lt=1)  # of the running means, per update of the student
    gan_weight: float = Field(1e-3, ge=0, le=MAX_WEIGHT)
    feature_layers: tuple[str, ...] = Field(("auto",), min_length=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "student", "fake", "discriminator"})

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"x0"})

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return self.feature_layers

    @property
    def feature_roles(self) -> frozenset[str]:
        return frozenset({"teacher"})

    @property
    def own_schedules(self) -> frozenset[str]:
        return frozenset({"student"})

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        return {"discriminator": Heads.for_denoiser(teacher, shape, condition)}

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        times = time_uniform(self.steps, self.shift)[:-1]
        guidance = Guidance(self.guidance)
        heads = roles["discriminator"].module
        low, high = self.renoise_times.low, self.renoise_times.high
        equal = torch.ones(self.bins, device=next(heads.parameters()).device)  # the ratio where p = q
        ratio_mean = RunningMean("ratio", equal, self.decay)
        weight_mean = RunningMean("weight", WEIGHTS[self.divergence](equal[:1]), self.decay)

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            t = self.renoise_times.sample(micro.random, len(sample.level))
            x_t, n = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t, t, sample.condition, guidance=guidance, input_grad="cond")
            F = roles.predict("fake", x_t.detach(), t, sample.condition).out.x0
            logits = heads(T.cond.features)
            bins = send(((t - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1), equal.device)
            r = ratio_mean.normalise(micro, density_ratio(logits), bins)
            h = weight_mean.normalise(micro, WEIGHTS[self.divergence](r), torch.zeros_like(bins))
            micro.log("health/h_max", h.max())
            health.observe(micro, schedule, sample, t, n, T, F)
            weight = expand_like(h, sample.output) * matching.l1_weight(sample.output, T.out.x0)
            match = matching.surrogate_loss(sample.output, T.out.x0.detach() - F, weight)
            yield LossTerm("match", match + self.gan_weight * generator_loss(logits))

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            t = self.critic_times.sample(micro.random, len(micro.sample.level))
            yield critic_term(micro, roles, t)

        def discriminator(micro: MicroBatch) -> Iterator[LossTerm]:
            sample, real = micro.sample, micro.batch["x0"]
            times = self.renoise_times
            t, t_real = (times.sample(micro.random, len(real), stream) for stream in ("generated", "real"))
            x_t, _ = matching.renoise(schedule, sample, t, micro.random)
            real_t = add_noise(schedule, real, micro.random.normal(real.shape, "real"), t_real)
            on_generated = heads(roles.predict("teacher", x_t, t, sample.condition).cond.features)
            on_real = heads(roles.predict("teacher", real_t, t_real, micro.batch.condition).cond.features)
            yield LossTerm("discriminator", discriminator_loss(on_generated, on_real))

        def update_means(_: KeyedRandom, totals: Mapping[str, Tensor]) -> None:
            ratio_mean.update(totals)
            weight_mean.update(totals)

        return Objective(
            updates=(
                Update("student", ("student",), student, Every(self.critic_updates), after=update_means),
                Update("fake", ("fake",), fake),
                Update("discriminator", ("discriminator",), discriminator),
            ),
            rollout=lambda micro: backward_simulation(micro, roles, times),
            state={mean.name: mean.sums for mean in (ratio_mean, weight_mean)},
            few_step=FewStep(times=times, rule="renoise", shift=self.shift),
        )
