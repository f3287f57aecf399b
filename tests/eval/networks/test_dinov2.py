"""DINOv2 from Meta's file, with the network made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.networks import dinov2
from fewstep.eval.networks.dinov2 import DinoV2
from fewstep.eval.networks.weights import WeightsLocator

import_torchvision()
timm = pytest.importorskip("timm")


def test_metas_file_is_loaded_and_its_position_embeddings_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    large = timm.create_model("vit_large_patch14_dinov2", img_size=518, num_classes=0, pretrained=False, **settings)
    weights = large.state_dict() | {"mask_token": torch.zeros(1, 64)}
    torch.save(weights, tmp_path / dinov2.FILE)
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **k, **settings))
    network = DinoV2.load(WeightsLocator((tmp_path,)))
    images = torch.randint(0, 256, (2, 3, 50, 50), dtype=torch.uint8)
    assert network(torch.stack([network.prepare(image) for image in images])).shape == (2, 64)
    resized = dinov2.to_timm(weights)["pos_embed"]
    assert resized.shape == (1, 1 + 16 * 16, 64)
    torch.testing.assert_close(resized[:, 0], weights["pos_embed"][:, 0])
    for other in ({"a": torch.zeros(1)}, [1, 2]):
        torch.save(other, tmp_path / dinov2.FILE)
        with pytest.raises(UserError, match="does not contain the weights of DINOv2"):
            DinoV2.load(WeightsLocator((tmp_path,)))
