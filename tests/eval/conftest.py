"""Random weights in the formats of Inception's files, for tests of networks and statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.networks import inception


class Script(nn.Module):
    """The interface of NVIDIA's TorchScript file: ``layers`` takes resized images, ``forward`` resizes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 9, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten())
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = F.interpolate(img.float(), [299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight)
        return F.softmax(logits if no_output_bias else logits + self.output.bias, dim=1)


@pytest.fixture(scope="session")
def write_script() -> Callable[[Path, int], None]:
    """Writes the TorchScript file into a folder, with weights that depend on the seed."""

    def write(folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        torch.jit.script(Script()).save(str(folder / inception.SCRIPT))

    return write


@pytest.fixture(scope="session")
def inception_weights(
    tmp_path_factory: pytest.TempPathFactory, write_script: Callable[[Path, int], None]
) -> Path:  # fmt: skip
    """A folder with both of Inception's files, of random networks."""
    import_torchvision()
    inception_pytorch = pytest.importorskip("cleanfid.inception_pytorch")
    folder = tmp_path_factory.mktemp("weights")
    write_script(folder, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception_pytorch.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / inception.PORT)
    return folder
