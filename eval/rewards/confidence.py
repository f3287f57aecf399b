"""The confidence of the evaluator's classifier in the label."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import ClassifierFeatures, extract_features


@torch.no_grad()
def confidence(network: ClassifierFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of the label [N] by the evaluator's classifier. Raises ``UserError`` if it lacks a label."""
    if (highest := int(labels.max())) >= network.classes_count:
        raise UserError(
            f"The classifier of the reference {network.name} has {network.classes_count} classes, and the "
            f"model's label is {highest}: give a --reference of images of the model's classes."
        )
    logits = network.network.classify(extract_features(network, images).to(network.network.device))
    return logits.log_softmax(1).cpu().gather(1, labels.cpu()[:, None])[:, 0]
