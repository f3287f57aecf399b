"""The mirror symmetry of an image, whatever its label or prompt."""

from __future__ import annotations

from torch import Tensor

from fewstep.eval.networks.features import ClassifierFeatures


def symmetry(network: ClassifierFeatures, images: Tensor, conditions: object) -> Tensor:
    """Minus the mean difference between an image and its mirror image [N], in -255..0."""
    x = images.float()
    return -(x - x.flip(-1)).abs().flatten(1).mean(1)
