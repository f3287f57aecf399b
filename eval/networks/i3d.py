"""I3D (Carreira & Zisserman, arXiv 1705.07750), the network of the FVD, as StyleGAN-V's TorchScript file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.weights import LoadedWeights, WeightsLocator, reading_weights

FILE = "i3d_torchscript.pt"
URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
SIDE, MINIMUM_FRAMES = 224, 10


@dataclass(frozen=True)
class I3d(LoadedWeights):
    """The 400 logits of videos of 10 frames or more: shorter side 224, centre crop, in -1..1."""

    name: str = "i3d"
    dimension: int = 400

    @classmethod
    def load(cls, locator: WeightsLocator, device: torch.device | str = "cpu") -> I3d:
        """Raises ``UserError`` if the weights are missing or belong to another network."""
        file = locator.find(FILE, URL)
        with reading_weights(file, "I3D"):
            network = torch.jit.load(file)
        return cls.from_file(file, network, device)

    def prepare(self, image: Tensor) -> Tensor:
        """uint8 [F, 3, H, W] -> float32 [3, F, 224, 224]. Raises ``UserError`` on too few frames."""
        if image.ndim != 4 or len(image) < MINIMUM_FRAMES:
            raise UserError(f"FVD needs videos of {MINIMUM_FRAMES} frames or more, got {list(image.shape)}.")
        scale = SIDE / min(image.shape[-2:])
        height, width = (max(SIDE, round(scale * side)) for side in image.shape[-2:])
        frames = F.interpolate(image.float(), (height, width), mode="bilinear")
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        return (frames[..., top : top + SIDE, left : left + SIDE] / 127.5 - 1).transpose(0, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(self.device), rescale=False, resize=False, return_features=True)
        return logits
