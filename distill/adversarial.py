"""Discriminators on the features of a denoiser: heads, GAN losses (arXiv 2405.14867), and their density ratio.

A head takes a feature layer's output at a noised sample. With the logistic loss its optimum is ``log p / q``, the log
ratio of real to generated density at that noise level.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import guide


class Head(nn.Module):
    """One logit per sample from a feature map [B, C, ...] or tokens [B, N, C]: an MLP at each position, averaged."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        x = features if features.ndim == 3 else features.movedim(1, -1)
        logits: Tensor = self.layers(x.float()).flatten(1).mean(1)
        return logits


class Heads(nn.Module):
    """A ``Head`` for each feature layer: features by path -> logits [B, layers], float32."""

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.paths = tuple(channels)
        self.heads = nn.ModuleList(Head(channels[path]) for path in self.paths)

    @staticmethod
    @torch.no_grad()
    def for_denoiser(denoiser: Denoiser, shape: tuple[int, ...], condition: Condition) -> Heads:
        """Heads for the features that ``denoiser`` returns, found by one evaluation; ``condition`` has one row."""
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
        features = guide(denoiser, torch.zeros(1, *shape, device=device), 0.5, condition).cond.features
        return Heads({path: x.shape[-1] if x.ndim == 3 else x.shape[1] for path, x in features.items()}).to(device)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([head(features[path]) for path, head in zip(self.paths, self.heads, strict=True)], 1)


def generator_loss(logits: Tensor) -> Tensor:
    """The generator's non-saturating loss, ``mean softplus(-logits)``."""
    return F.softplus(-logits).mean()


def discriminator_loss(generated: Tensor, real: Tensor) -> Tensor:
    """The discriminator's logistic loss; ``2 log 2`` if its logits are 0."""
    return F.softplus(generated).mean() + F.softplus(-real).mean()


def density_ratio(logits: Tensor, low: float = 0.1, high: float = 20.0) -> Tensor:
    """``p / q`` [B] of real to generated density from logits [B, layers], detached, in [low, high]."""
    return logits.detach().float().mean(1).exp().clamp(low, high)
