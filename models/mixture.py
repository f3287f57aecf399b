"""Gaussian mixtures with closed-form density, score and posterior mean at every noise level: exact teachers.

If ``x0 ~ sum_k w_k N(mu_k, s_k^2 I)`` and ``x_t = alpha x0 + sigma noise``, then ``x_t`` is a mixture of
``N(alpha mu_k, v_k I)`` with ``v_k = alpha^2 s_k^2 + sigma^2``, and with the responsibilities ``r_k(x_t)``

    score(x_t) = -sum_k r_k (x_t - alpha mu_k) / v_k
    E[x0|x_t]  =  sum_k r_k (mu_k + alpha s_k^2 (x_t - alpha mu_k) / v_k)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.schedules import NoiseSchedule


class GaussianMixture(nn.Module):
    """``weights`` [K] > 0 (normalised here), ``means`` [K, D], ``stds`` [K] >= 0 (isotropic); stored in float64.

    ``labels`` [K] in 0..C-1 assigns each component to a class. Class ``c`` is then the mixture of its components, and
    the null label ``C`` (``classes``) that of all; without ``labels`` C = 0. Points x are [B, ...] with D values per
    sample; ``alpha`` and ``sigma`` are numbers or [B]; a call's ``labels`` [B] default to null. Results are undefined
    only for a component of zero variance, ``s_k = sigma = 0``.
    """

    log_weights: Tensor  # [C + 1, K]: of the components given each class; the last row is unconditional
    means: Tensor
    stds: Tensor

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        stds: Sequence[float] | Tensor,
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        log_weights, means, stds = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        log_weights = log_weights.log()
        if means.ndim != 2 or log_weights.shape != means.shape[:1] or stds.shape != means.shape[:1]:
            raise ValueError("a mixture needs weights [K], means [K, D] and stds [K]")
        self.classes = max(labels) + 1 if labels is not None else 0
        rows = [log_weights]
        if labels is not None:
            if len(labels) != len(means) or set(labels) != set(range(self.classes)):
                raise ValueError("a mixture's labels need one entry per component, and each class a component")
            member = torch.tensor(labels) == torch.arange(self.classes)[:, None]
            rows = [*log_weights.where(member, -math.inf), log_weights]
        self.register_buffer("log_weights", torch.stack(rows).log_softmax(-1))
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    @classmethod
    def single(
        cls, mean: float | Sequence[float] | Tensor, std: float, dimensions: int | None = None
    ) -> GaussianMixture:
        """One Gaussian ``N(mean, std^2 I)``; ``mean`` is [D], or a number that is repeated for all ``dimensions``."""
        center = torch.as_tensor(mean, dtype=torch.float64)
        return cls([1.0], center.expand(1, dimensions or center.numel()), [std])

    def _components(
        self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log(weight x density) [B, K], ``x_t - alpha mu_k`` [B, K, D], variances [B, K, 1], alpha [B, 1, 1]."""
        device = self.means.device
        levels = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in (alpha, sigma))
        alpha, sigma = (level.reshape(-1, 1, 1) for level in levels)
        offset = x_t.to(self.means).flatten(1)[:, None] - alpha * self.means
        variance = (alpha * self.stds[:, None]) ** 2 + sigma**2
        prior = self.log_weights[-1 if labels is None else labels]
        distance = (offset**2 / variance + (2 * math.pi * variance).log()).sum(-1)
        return prior - distance / 2, offset, variance, alpha

    def log_density(
        self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """Log density of ``x_t``: [B], float64."""
        return self._components(x_t, alpha, sigma, labels)[0].logsumexp(-1)

    def score(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The gradient of ``log_density`` with respect to ``x_t``, in its shape, float64."""
        joint, offset, variance, _ = self._components(x_t, alpha, sigma, labels)
        return -(joint.softmax(-1)[..., None] * offset / variance).sum(1).view_as(x_t)

    def x0(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The posterior mean ``E[x0|x_t]``, in the shape of ``x_t``, float64: ``x_t / alpha`` at sigma = 0, the mean of
        the mixture at alpha = 0."""
        joint, offset, variance, alpha = self._components(x_t, alpha, sigma, labels)
        means = self.means + alpha * self.stds[:, None] ** 2 / variance * offset
        return (joint.softmax(-1)[..., None] * means).sum(1).view_as(x_t)

    def sample(self, n: int, seed: int | torch.Generator = 0, labels: Tensor | None = None) -> Tensor:
        """Samples ``n`` points x0 [n, D], float64 on the CPU, of the classes ``labels`` [n] if given."""
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        null = torch.full((n,), self.classes)
        weights = self.log_weights.cpu()[null if labels is None else labels].exp()
        k = weights.multinomial(1, generator=generator)[:, 0]
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means.cpu()[k] + self.stds.cpu()[k, None] * noise


class MixtureBackbone(nn.Module):
    """``(x_t [B, ...], t [B], condition) -> E[x0|x_t]`` in the dtype of ``x_t``, at the levels of ``schedule``.

    ``Denoiser(MixtureBackbone(mixture, schedule), schedule, "x0")`` is an exact teacher. It uses
    ``condition["labels"]`` (classes or null) if the mixture has classes and the condition has labels.
    """

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mixture = mixture
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        labels = condition.get("labels") if self.mixture.classes else None
        return self.mixture.x0(x_t, self.schedule.alpha(t), self.schedule.sigma(t), labels).to(x_t)
