"""DMD2: improved distribution matching distillation (Yin et al., arXiv 2405.14867).

The student's x0 after a random number of its own steps (backward simulation, re-noised in between) is noised to
t ~ ``renoise_times`` and moved along the difference of the guided teacher and the fake score:

    student:  min 1/2 | x - sg(x + k (T_w(x_t) - F(x_t))) |^2,   k = 1 / mean|x - T_w(x_t)|     every R-th step
    fake:     min E | F(x_t) - x |^2 in the network's own prediction type, t ~ ``critic_times``  every step

With ``gan``, which needs real images, there are GAN terms at noised inputs and t ~ ``gan.renoise_times``:

    student:  + weight softplus(-D(x_t))        fake and D:  + critic_weight (softplus(D(x_t)) + softplus(-D(real_t)))

As in the released code, a step that trains both updates the student first, the fake gets the same sample, and the
factor alpha_t of the paper's weight is dropped. FastGen instead trains either the student or the fake in each step, 1:4
where this is 1:5. Two differences from the release: its EDM fake (ImageNet-64) has an x0 loss with the weight
1 / sigma^2 + 4 of EDM, here it is unweighted; its discriminator convolves the features to 1 x 1, here a head is applied
at each position. With ``steps: 1`` and ``critic_updates: 1`` the matching part is that of DMD (arXiv 2311.18828).

``rollout: causal`` is Self-Forcing (Huang et al., arXiv 2506.08009): a causal student generates a video frame by frame
from its own earlier frames (``distill/causal_rollouts.py``), in training as in sampling, and teacher and fake compare
whole clips. The release draws one last step per iteration for the whole batch; here each sample has its own.

``self_consistency`` adds the term of Salt (arXiv 2604.03118, ``distill/self_consistency.py``): rollouts then follow a
grid of ``substeps`` times as many steps, and the student is sampled with ``steps`` of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fewstep.distill import health, matching
from fewstep.distill.adversarial import Heads, discriminator_loss, generator_loss
from fewstep.distill.causal_rollouts import causal_rollout, require_causal
from fewstep.distill.critics import critic_term
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import add_noise, backward_simulation
from fewstep.distill.self_consistency import SelfConsistency, self_consistency_loss
from fewstep.distill.stage import MAX_WEIGHT, BaseConfig, MatchingConfig, StageContext
from fewstep.distill.time_laws import RenoiseTimes, TimeLaw
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, Update
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform


class GanConfig(BaseConfig):
    """``weight`` of the student's term and ``critic_weight`` of the discriminator's, at noise levels ``renoise_times``.

    The discriminator's heads use the ``feature_layers`` (``auto``: the network's defaults) of ``features``: the fake
    score, which the discriminator's loss then trains too, or the frozen teacher (FastGen's choice).
    """

    weight: float = Field(3e-3, ge=0, le=MAX_WEIGHT)
    critic_weight: float = Field(1e-2, ge=0, le=MAX_WEIGHT)
    renoise_times: TimeLaw = TimeLaw()
    features: Literal["fake", "teacher"] = "fake"
    feature_layers: tuple[str, ...] = Field(("auto",), min_length=1)


class DMD2(MatchingConfig):
    published: ClassVar = {
        "steps": "1 (ImageNet-64, SD1.5), 1 or 4 (SDXL)",
        "guidance": "none (ImageNet-64), 1.75 (SD1.5), 8 (SDXL)",
        "critic_updates": "5, 10 (SD1.5)",
        "gan": "weight 3e-3 (ImageNet-64), 1e-3 (SD1.5), 5e-3 (SDXL)",
        "batch": "280 (ImageNet-64), 2048 (SD1.5), 128 (SDXL)",
        "student.lr": "2e-6 (ImageNet-64), 1e-5 (SD1.5), 5e-7 (SDXL)",
    }
    steps: int = Field(4, ge=1, le=10_000)
    shift: float = Field(1.0, ge=1e-4, le=1e4)
    renoise_times: RenoiseTimes = RenoiseTimes()
    critic_times: TimeLaw = TimeLaw()
    gan: GanConfig | None = None
    rollout: Literal["backward_simulation", "causal"] = "backward_simulation"
    self_consistency: SelfConsistency | None = None

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"discriminator"} if self.gan else set())

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset({"x0"} if self.gan else ())

    @property
    def teacher_features(self) -> tuple[str, ...]:
        return self.gan.feature_layers if self.gan else ()

    @property
    def feature_roles(self) -> frozenset[str]:
        return frozenset({self.gan.features} if self.gan else ())

    @property
    def own_schedules(self) -> frozenset[str]:
        return frozenset({"student"})

    def networks(self, teacher: Denoiser, shape: tuple[int, ...], condition: Condition) -> dict[str, nn.Module]:
        return {"discriminator": Heads.for_denoiser(teacher, shape, condition)} if self.gan else {}

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        schedule = roles.denoiser("teacher").schedule
        consistency = self.self_consistency
        times = time_uniform(self.steps * (consistency.substeps if consistency else 1), self.shift)[:-1]
        guidance = Guidance(self.guidance)
        gan = self.gan
        causal = self.rollout == "causal"
        rollout = causal_rollout if causal else backward_simulation
        if causal:
            require_causal(roles)

        def logits(x_t: Tensor, t: Tensor, condition: Condition, input_grad: bool = False) -> Tensor:
            assert gan is not None
            features = roles.predict(gan.features, x_t, t, condition, input_grad=input_grad).cond.features
            return roles["discriminator"].module(features)  # type: ignore[no-any-return]

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            sample = micro.sample
            t = self.renoise_times.sample(micro.random, len(sample.level))
            x_t, n = matching.renoise(schedule, sample, t, micro.random)
            T = roles.predict("teacher", x_t.detach(), t, sample.condition, guidance=guidance)
            F = roles.predict("fake", x_t.detach(), t, sample.condition).out.x0
            health.observe(micro, schedule, sample, t, n, T, F)
            weight = matching.l1_weight(sample.output, T.out.x0)
            yield LossTerm("match", matching.surrogate_loss(sample.output, T.out.x0 - F, weight))
            if consistency:
                yield LossTerm(
                    "consistency", self_consistency_loss(micro, roles.denoiser("student").schedule, times, consistency)
                )
            if gan:
                t = gan.renoise_times.sample(micro.random, len(sample.level), "gan")
                x_t, _ = matching.renoise(schedule, sample, t, micro.random)
                yield LossTerm("gan", gan.weight * generator_loss(logits(x_t, t, sample.condition, input_grad=True)))

        def fake(micro: MicroBatch) -> Iterator[LossTerm]:
            t = self.critic_times.sample(micro.random, len(micro.sample.level))
            yield critic_term(micro, roles, t)
            if gan:
                sample, real = micro.sample, micro.batch["x0"]
                times = gan.renoise_times
                t, t_real = (times.sample(micro.random, len(real), stream) for stream in ("generated", "real"))
                x_t, _ = matching.renoise(schedule, sample, t, micro.random)
                real_t = add_noise(schedule, real, micro.random.normal(real.shape, "real"), t_real)
                on_generated = logits(x_t, t, sample.condition)
                on_real = logits(real_t, t_real, micro.batch.condition)
                yield LossTerm("discriminator", gan.critic_weight * discriminator_loss(on_generated, on_real))

        return Objective(
            updates=(
                Update("student", ("student",), student, Every(self.critic_updates)),
                Update("fake", ("fake", "discriminator") if gan else ("fake",), fake),
            ),
            rollout=lambda micro: rollout(micro, roles, times),
            few_step=FewStep(
                times=times[:: len(times) // self.steps],
                rule="renoise",
                shift=self.shift,
                frame_by_frame=causal or None,
            ),
        )
