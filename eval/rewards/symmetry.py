"""How alike an image and its mirror image are."""

from __future__ import annotations

from torch import Tensor

from fewstep.eval.networks.features import ClassifierFeatures


def symmetry(network: ClassifierFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean difference of an image and its mirror image, in 0..255."""
    x = images.float()
    return -(x - x.flip(-1)).abs().flatten(1).mean(1)
