"""DINOv2 (Oquab et al., arXiv 2304.07193), the network of FD-DINOv2 (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.networks.inception import resize_antialiased
from fewstep.eval.networks.weights import LoadedWeights, WeightsLocator, reading_weights

FILE = "dinov2_vitl14_pretrain.pth"
URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{FILE}"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoV2(LoadedWeights):
    """The class token of ViT-L/14, 1024 numbers, of images resized to 224 by an antialiased bicubic filter."""

    name: str = "dinov2"
    dimension: int = 1024

    @classmethod
    def load(cls, locator: WeightsLocator, device: torch.device | str = "cpu") -> DinoV2:
        """Meta's file in timm's network. Raises ``UserError`` if it is missing or belongs to another network."""
        import_torchvision()
        import timm

        file = locator.find(FILE, URL)
        network = timm.create_model("vit_large_patch14_dinov2", img_size=SIDE, num_classes=0, pretrained=False)
        with reading_weights(file, "DINOv2 ViT-L/14"):
            network.load_state_dict(to_timm(torch.load(file, map_location="cpu", weights_only=True)))
        return cls.from_file(file, network, device)

    def prepare(self, image: Tensor) -> Tensor:
        return resize_antialiased(image, SIDE)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device) / 255
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        tokens: Tensor = self.network.forward_features((x - mean) / std)
        return tokens[:, 0]


def to_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's weights for timm's network: the 37 x 37 position embeddings are resized as Meta's code does."""
    first, grid = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
    side = math.isqrt(grid.shape[1])
    new_side = SIDE // weights["patch_embed.proj.weight"].shape[-1]
    if side != new_side:
        square = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = (new_side + 0.1) / side
        square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
        grid = square.permute(0, 2, 3, 1).flatten(1, 2)
    kept = {name: value for name, value in weights.items() if name != "mask_token"}
    return kept | {"pos_embed": torch.cat([first, grid], 1)}
