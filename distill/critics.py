"""The fake score's regression: an unbiased denoising target for a student sample at any noise level.

For ``x_t = scale x_s + std n`` denoising score matching gives the targets (Phased DMD, arXiv 2510.27684)

    noise* = (sigma_t / std) n          x0* = (x_t - sigma_t noise*) / alpha_t = x_s / alpha_s - k n

whose conditional means given ``x_t`` are those of the sample's distribution diffused to ``t``. For a clean sample,
``s = 0``, they are ``noise* = n`` and ``x0* = x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.transfer import like
from fewstep.distill import matching
from fewstep.distill.roles import Roles
from fewstep.distill.update import LossTerm, MicroBatch, StudentSample
from fewstep.models.denoiser import expand_like
from fewstep.models.prediction import Coefficients, Prediction
from fewstep.models.schedules import NoiseSchedule, bridge


def critic_term(micro: MicroBatch, roles: Roles, t: Tensor, clamp: float | None = None) -> LossTerm:
    """The critic's term: the role ``fake`` denoises the student's sample, re-noised to times ``t`` [B]."""
    schedule = roles.denoiser("fake").schedule
    x_t, n = matching.renoise(schedule, micro.sample, t, micro.random)
    F = roles.predict("fake", x_t, t, micro.sample.condition).out
    return LossTerm("critic", denoising_loss(F, schedule, micro.sample, t, n, clamp))


def importance_critic_term(micro: MicroBatch, roles: Roles, t: Tensor) -> LossTerm:
    """TDM's: at the same points, the weighted regression to the x0 that the sample came from."""
    sample, schedule = micro.sample, roles.denoiser("fake").schedule
    x_t, n = matching.renoise(schedule, sample, t, micro.random)
    F = roles.predict("fake", x_t, t, sample.condition).out
    return LossTerm("critic", weighted_clean_loss(F, sample, importance_weight(schedule, sample, sample.output, t, n)))


def denoising_loss(
    fake: Prediction, schedule: NoiseSchedule, sample: StudentSample, t: Tensor, n: Tensor, clamp: float | None = None
) -> Tensor:
    """The mean squared error of the fake's raw output against the target; ``t`` [B], ``n`` is the bridge's noise.

    It is weighted by ``std^2 / sigma_t^2``, which is 1 for a clean sample and keeps the target's variance bounded as
    ``t -> s``; with ``clamp``, by the paper's ``min(1, clamp std^2)``, which does the same.
    """
    x0, noise, weight = denoising_target(schedule, sample, t, n)
    if clamp is not None:
        std = expand_like(bridge(schedule, sample.level, t)[1], n)
        (weight,) = like(n, (clamp * std.square()).clamp(max=1))
    c = Coefficients.at(schedule, expand_like(t, n))
    a, b = like(n, *c.row(fake.kind))
    target = a * x0 + b * noise
    return (weight * (fake.raw - target).square()).mean()


def denoising_target(
    schedule: NoiseSchedule, sample: StudentSample, t: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x0*, noise*, weight) as above, for times ``t`` [B] above the sample's level; the weight is [B, 1, ...]."""
    s, t = expand_like(sample.level, n), expand_like(t, n)
    _, std = bridge(schedule, s, t)
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    k = alpha_t * sigma_s**2 / (alpha_s**2 * std)
    alpha_s, k, ratio, weight = like(n, alpha_s, k, sigma_t / std, (std / sigma_t).square())
    return sample.x.detach() / alpha_s - k * n, ratio * n, weight


def importance_weight(
    schedule: NoiseSchedule, sample: StudentSample, x0: Tensor, t: Tensor, n: Tensor, *, tempered: bool = True
) -> Tensor:
    """TDM's ratio ``q(x_t | x0) / q(x_t | x_s)`` (arXiv 2503.06674), detached, [B, 1, ...].

    It is ``(std / sigma_t)^d exp((|n|^2 - |m|^2) / 2)`` with ``m = (x_t - alpha_t x0) / sigma_t`` and d dimensions per
    sample. The exponent is of order d, so its d-th root is taken (``tempered``). The published
    code does so too, but drops the factor ``std / sigma_t``.
    """
    scale, std = (expand_like(value, n) for value in bridge(schedule, sample.level, t))
    times = expand_like(t, n)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    scale, std, alpha, sigma, log_std = like(n, scale, std, alpha, sigma, torch.log(std / sigma))
    x_t = scale * sample.x.detach() + std * n
    m = (x_t - alpha * x0.detach()) / sigma
    log_ratio = log_std + 0.5 * matching.per_sample_mean(n.square() - m.square())
    return torch.exp(log_ratio if tempered else log_ratio * n[0].numel())


def weighted_clean_loss(fake: Prediction, sample: StudentSample, weight: Tensor, snr_cap: float = 5.0) -> Tensor:
    """TDM's critic: regression to the x0 that the sample came from, times ``weight`` and ``min(SNR, cap)``."""
    c = fake.coefficients
    (snr,) = like(fake.raw, (c.alpha / c.sigma).square().clamp(max=snr_cap))
    return (weight * snr * (fake.x0 - sample.output.detach()).square()).mean()
