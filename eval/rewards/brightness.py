"""The brightness of an image, whatever its label or prompt."""

from __future__ import annotations

from torch import Tensor

from fewstep.eval.networks.features import ClassifierFeatures


def brightness(network: ClassifierFeatures, images: Tensor, conditions: object) -> Tensor:
    """The mean of the pixels [N], in 0..255."""
    return images.float().flatten(1).mean(1)
