"""I3D's input, and FVD of videos from files and in memory, with a network that returns the mean brightness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from worlds import tiny_teacher

from fewstep import load
from fewstep.core.errors import UserError
from fewstep.core.image_grid import save_sample
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.images import InMemoryImages
from fewstep.eval.networks import i3d
from fewstep.eval.networks.i3d import I3d
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol


class Brightness(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean([1, 3, 4])[:, :1].expand(-1, 400)


@pytest.fixture
def locator(tmp_path: Path) -> WeightsLocator:
    torch.jit.script(Brightness()).save(str(tmp_path / i3d.FILE))
    return WeightsLocator((tmp_path,))


def test_videos_become_224_pixels_between_minus_one_and_one(locator: WeightsLocator) -> None:
    network = I3d.load(locator)
    dark, light = torch.zeros(12, 3, 30, 40, dtype=torch.uint8), torch.full((12, 3, 30, 40), 255).byte()
    prepared = torch.stack([network.prepare(video) for video in (dark, light)])
    assert prepared.shape == (2, 3, 12, 224, 224)
    assert network(prepared)[:, 0].tolist() == pytest.approx([-1, 1])
    with pytest.raises(UserError, match="videos of 10 frames or more"):
        network.prepare(dark[:4])


def test_fvd_of_videos_from_files_and_in_memory(locator: WeightsLocator, tmp_path: Path) -> None:
    frames = (torch.arange(5) * 30).byte()[:, None, None, None, None].expand(5, 12, 3, 16, 16).contiguous()
    frames[:, range(12), :, range(12)] = 200  # a moving line: GIF omits repeated frames
    for k, video in enumerate(frames):
        save_sample(video, tmp_path / "real" / f"{k}.gif")
    protocol = Protocol(name="own", metrics=("fvd",), reference=str(tmp_path / "real"), n=5, frames=12)
    evaluator = ProtocolEvaluator(protocol, locator)
    assert evaluator.measure(protocol.open_images(tmp_path / "real"))["fvd"].value == pytest.approx(0, abs=1e-3)
    assert evaluator.measure(InMemoryImages([frames[:2], frames[2:]]))["fvd"].value == pytest.approx(0, abs=1e-3)
    brighter = 400 * (51 / 127.5) ** 2  # by 51 of 255, in each of 400 features
    assert evaluator.measure(InMemoryImages([frames + 51]))["fvd"].value == pytest.approx(brighter, rel=1e-3)
    with pytest.raises(UserError, match="scores videos; this model generates images"):
        evaluator.check(load(tiny_teacher(tmp_path / "teacher"), "cpu"))
