"""General feature networks as a reference uses them: on images of one shape, uint8 [N, C, H, W], grey ones as RGB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.eval.networks.dinov2 import DinoV2
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.features import FeatureNetwork, require_images
from fewstep.eval.networks.inception import Inception
from fewstep.eval.networks.random_features import RandomFeatures
from fewstep.eval.networks.weights import WeightsLocator

LOADERS: dict[str, Callable[[WeightsLocator, torch.device | str], FeatureNetwork]] = {
    "efficientnet": lambda locator, device: EfficientNet.load(device),
    "dinov2": DinoV2.load,
    "inception": lambda locator, device: Inception.load("clean", locator, device),
    "random": lambda locator, device: RandomFeatures.load(device),
}


@dataclass(frozen=True)
class ImageFeatures:
    """``name`` is part of the name of the Fréchet distance: ``fd_efficientnet``."""

    name: str
    shape: tuple[int, int, int]
    network: FeatureNetwork

    @staticmethod
    def load(
        name: str, shape: tuple[int, int, int], locator: WeightsLocator, device: torch.device | str = "cpu"
    ) -> ImageFeatures:
        """Raises ``UserError`` on an unknown name, and if the network's weights or packages are missing."""
        if name not in LOADERS:
            raise UserError(f"{name!r} is no network of references{nearest(name, ['classifier', *LOADERS])}.")
        return ImageFeatures(name, shape, LOADERS[name](locator, device))

    @property
    def sha256(self) -> str:
        return self.network.sha256

    @property
    def dimension(self) -> int:
        return self.network.dimension

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, D]. Raises ``UserError`` on other images."""
        require_images(self.name, images, self.shape)
        rgb = images.cpu().expand(-1, 3, -1, -1)
        return self.network(torch.stack([self.network.prepare(image) for image in rgb]))
