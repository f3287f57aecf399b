"""Inception's spatial and patch features on random weights of the real shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_sets import normal, smooth_images, write_images
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.feature_statistics import collect_statistics, read_statistics
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.frechet import Statistics
from fewstep.eval.networks.inception import PORT, Inception, InceptionPatch
from fewstep.eval.networks.inception_spatial import InceptionSpatial, resize_as_tensorflow
from fewstep.eval.networks.registry import build_networks
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol

pytest.importorskip("cleanfid")


class Tiny:
    """A network of the name and dimension of the spatial one, without its cost."""

    name, sha256, dimension = "inception_spatial", "ab", 2023


@pytest.mark.parametrize("size", [(32, 48), (299, 299), (400, 640)])
def test_resizing_equals_tensorflows_as_ported_by_torch_fidelity(size: tuple[int, int]) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as theirs

    x = torch.randint(0, 256, (2, 3, *size)).float()
    torch.testing.assert_close(
        resize_as_tensorflow(x, 299), theirs(x, size=(299, 299), align_corners=False), rtol=0, atol=0.02
    )  # of 255
    if size == (299, 299):
        assert torch.equal(resize_as_tensorflow(x, 299), x)


def test_the_first_seven_channels_of_mixed_6_come_by_row_column_and_channel(inception_weights: Path) -> None:
    """As in torch-fidelity's port of the same network, at the layer that ADM's evaluator reads."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = InceptionSpatial.load(WeightsLocator((inception_weights,)))
    images = smooth_images(2, 0, 64)
    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception_weights / PORT)
    )
    seen: list[Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *layer_input_output: seen.append(layer_input_output[2]))
    theirs(images)
    (layer,) = seen
    assert layer.shape == (2, 192, 17, 17)
    features = network(torch.stack([network.prepare(image) for image in images]))
    assert features.shape == (2, network.dimension) == (2, 2023)
    torch.testing.assert_close(
        features.reshape(2, 17, 17, 7), layer[:, :7].permute(0, 2, 3, 1), rtol=1e-3, atol=1e-3 * float(layer.max())
    )


def test_adms_files_contain_the_spatial_statistics_beside_those_of_the_pool_features(tmp_path: Path) -> None:
    spatial = Statistics.of(normal(5, 2023))
    np.savez(
        tmp_path / "VIRTUAL.npz", arr_0=np.zeros(2), mu=np.zeros(2048), sigma=np.zeros((2048, 2048)),
        mu_s=spatial.mean.numpy(), sigma_s=spatial.covariance.numpy(),
    )  # fmt: skip
    network: Any = Tiny()
    read = read_statistics(tmp_path / "VIRTUAL.npz", network).statistics
    assert torch.equal(read.mean, spatial.mean)
    assert torch.equal(read.covariance, spatial.covariance)
    np.savez(tmp_path / "own.npz", mu=spatial.mean.numpy(), sigma=spatial.covariance.numpy())
    assert torch.equal(read_statistics(tmp_path / "own.npz", network).statistics.mean, spatial.mean)
    network.name, network.dimension = "inception_legacy_tensorflow", 2048
    assert torch.equal(read_statistics(tmp_path / "VIRTUAL.npz", network).statistics.mean, torch.zeros(2048).double())


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch", "legacy_tensorflow"])
def test_a_patch_is_the_centre_without_resizing(mode: str, inception_weights: Path) -> None:
    whole = Inception.load(mode, WeightsLocator((inception_weights,)))
    patch = InceptionPatch(whole)
    image = smooth_images(1, 0, 401)[0, :, :, :340]
    prepared = patch.prepare(image)
    torch.testing.assert_close(prepared.float(), image[:, 51:350, 20:319].float(), rtol=0, atol=1e-3)
    assert patch(prepared[None]).shape == (1, patch.dimension)
    assert (patch.name, patch.sha256) == (f"inception_{mode}_patch", whole.sha256)
    with pytest.raises(UserError, match=r"A patch of 299 x 299 pixels does not fit into an image of 298 x 401"):
        patch.prepare(image[:, :, :298])


def test_images_without_room_for_a_patch_are_named_or_left_out(inception_weights: Path, tmp_path: Path) -> None:
    """Some photos of COCO are too small."""
    folder = write_images(tmp_path / "images", 3, 0, 310)
    Image.new("RGB", (640, 200)).save(folder / "001.png")
    network = InceptionPatch(Inception.load("clean", WeightsLocator((inception_weights,))))
    with pytest.raises(UserError, match=r"001\.png cannot be scored: A patch of 299 x 299 .* image of 640 x 200"):
        collect_statistics({"x": network}, ImageSet.open(folder))
    images = ImageSet.open(folder, skip_bad=True)
    assert collect_statistics({"x": network}, images)["x"].statistics.count == 2
    assert set(images.done.skipped) == {"001.png"}


def test_a_protocol_that_resizes_images_below_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_fid needs images of 299 pixels or more, not of size 256"):
        Protocol(name="a", reference="x", metrics=("patch_fid",), n=10, size=256)
    Protocol(name="a", reference="x", metrics=("patch_fid",), n=10, size=512)


def test_images_are_scored_by_their_spatial_and_patch_features(inception_weights: Path, tmp_path: Path) -> None:
    real, generated = (write_images(tmp_path / name, 5, seed, 310) for seed, name in enumerate(("real", "generated")))
    protocol = Protocol(name="a", reference=str(real), metrics=("sfid", "patch_fid", "fid"), n=5)
    evaluator = ProtocolEvaluator(protocol, WeightsLocator((inception_weights,)))
    same = evaluator.measure(ImageSet.open(real))
    other = evaluator.measure(ImageSet.open(generated))
    for name in protocol.metrics:
        assert same[name].value < 1e-3 * other[name].value, name
    assert len({round(measured.value, 6) for measured in other.values()}) == 3
    networks = build_networks(
        ("inception_spatial", "inception_patch"), protocol, WeightsLocator((inception_weights,)), "cpu"
    )
    assert {network.name for network in networks.values()} == {"inception_spatial", "inception_clean_patch"}


def test_resizing_by_hand() -> None:
    """The first output pixel is the first input pixel, not shifted by half a pixel as in torch."""
    x = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_as_tensorflow(x, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
