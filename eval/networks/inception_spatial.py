"""Inception-V3's spatial features, the network of the sFID (Nash et al., arXiv 2103.03841), as in ADM's evaluator.

The evaluator's TensorFlow graph resizes images itself, so its resizing is repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from fewstep.eval.networks.inception import PORT, PORT_URL, SIDE, load_port
from fewstep.eval.networks.weights import LoadedWeights, WeightsLocator, hub_cache, reading_weights

CHANNELS, GRID = 7, 17


@dataclass(frozen=True)
class InceptionSpatial(LoadedWeights):
    """The first 7 channels of ``mixed_6/conv`` on its 17 x 17 grid, which are the 2023 numbers of ADM's files, in their
    order: row, column, channel."""

    name: str = "inception_spatial"
    dimension: int = CHANNELS * GRID * GRID

    @classmethod
    def load(cls, locator: WeightsLocator, device: torch.device | str = "cpu") -> InceptionSpatial:
        """pytorch-fid's file of the same network. Raises ``UserError`` if it is missing or belongs to another one."""
        file = locator.find(PORT, PORT_URL, [hub_cache()])
        with reading_weights(file, "Inception-V3"):
            port = load_port(file)
        before = [layer for _, layer in takewhile(lambda item: item[0] != "Mixed_6d", port.named_children())]
        last = port.get_submodule("Mixed_6d.branch1x1")
        return cls.from_file(file, nn.Sequential(*before, last), device)

    def prepare(self, image: Tensor) -> Tensor:
        return image

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = resize_as_tensorflow(images.to(self.device).float(), SIDE)
        features: Tensor = self.network((x - 128) / 128)
        return features[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)


def resize_as_tensorflow(x: Tensor, side: int) -> Tensor:
    """float32 [N, C, H, W] -> [N, C, side, side], as TensorFlow 1 does by default: linear interpolation in which output
    pixel i lies at ``i H / side``, so that the first pixels coincide, without a filter against aliasing."""
    for dim in (2, 3):
        n = x.shape[dim]
        place = torch.arange(side, device=x.device) * (n / side)
        low = place.long()
        high = (low + 1).clamp(max=n - 1)
        fraction = (place - low).view([side if d == dim else 1 for d in range(4)])
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), fraction)
    return x
