"""EfficientNet-Lite0, the one network whose true weights are installed."""

from __future__ import annotations

import pytest
import torch
from random_sets import smooth_images

from fewstep.eval.networks.efficientnet import EfficientNet

pytest.importorskip("efficientnet_lite_pytorch")


def test_features_distinguish_smooth_images_from_noise() -> None:
    network = EfficientNet.load()
    noise = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([smooth_images(4, 0, 64), noise])
    features = network(torch.stack([network.prepare(image) for image in images]))
    assert features.shape == (8, network.dimension)
    distances = torch.cdist(features, features)
    assert distances[:4, :4].mean() < distances[:4, 4:].mean()
    assert distances[4:, 4:].mean() < distances[:4, 4:].mean()
