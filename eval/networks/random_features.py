"""Features of a convolutional network with random weights: for images for which no trained network is at hand.

They tell colours, textures and layouts apart, not objects; a distance of them is only comparable with another one of
them. Random networks as features: Naeem et al., arXiv 2002.09797, section 4.3.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 48, 64)


@dataclass(frozen=True)
class RandomFeatures:
    """Mean and standard deviation over positions of the responses of three random convolutions, each of which halves
    the resolution, and of the pixels: 294 numbers."""

    sha256: str
    network: nn.ModuleList
    device: torch.device
    name: str = "random_features"

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> Self:
        """The weights are the same everywhere: orthogonal filters of a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        network = nn.ModuleList()
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layer = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            normal = torch.randn(max(width, 9 * before), min(width, 9 * before), generator=generator)
            filters = torch.linalg.qr(normal.double())[0]
            filters = filters if width >= 9 * before else filters.T
            layer.weight.data = 2 * filters.reshape(layer.weight.shape).float()
            network.append(layer)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in network.parameters()))
        return cls(digest.hexdigest(), network.eval().to(device), torch.device(device))

    @property
    def dimension(self) -> int:
        return 2 * (3 + sum(WIDTHS))

    def prepare(self, image: Tensor) -> Tensor:
        return image

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device) / 127.5 - 1
        found = [x]
        for layer in self.network:
            x = F.silu(layer(x))
            found.append(x)
        return torch.cat([part for y in found for part in (y.mean((2, 3)), y.flatten(2).std(2, correction=0))], 1)
