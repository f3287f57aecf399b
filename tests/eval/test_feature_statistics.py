"""Statistics of features: which images a network takes, and which files of statistics belong to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_sets import normal, write_images

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import (
    collect_statistics,
    contains_statistics,
    read_statistics,
    write_statistics,
)
from fewstep.eval.images import ImageSet, InMemoryImages
from fewstep.eval.metrics.frechet import Statistics, grouped_moments
from fewstep.eval.networks.inception import Inception
from fewstep.eval.networks.weights import WeightsLocator


class Pixels:
    """A network whose features are the pixels."""

    name, sha256, dimension = "pixels", "ab", 3 * 4 * 4

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        return image.float()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).clone()  # the input's memory is reused


def test_statistics_in_batches_equal_those_of_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.eval.feature_statistics.MERGE_ROWS", 40)
    images = torch.randint(0, 256, (150, 3, 4, 4), dtype=torch.uint8)
    collected = collect_statistics({"x": Pixels(), "y": Pixels()}, InMemoryImages(images.split(70)), frozenset({"y"}))
    expected = Statistics.of(images.flatten(1).float())
    for each in collected.values():
        assert each.statistics.count == 150
        torch.testing.assert_close(each.statistics.mean, expected.mean)
        torch.testing.assert_close(each.statistics.covariance, expected.covariance)
    assert torch.equal(collected["y"].features(), images.flatten(1).float())
    with pytest.raises(UserError, match="only a mean and a covariance"):
        collected["x"].features()
    with pytest.raises(UserError, match="no images"):
        collect_statistics({"x": Pixels()}, InMemoryImages([]))


def test_the_groups_of_the_jackknife_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.eval.feature_statistics.MERGE_ROWS", 5)
    images = torch.randint(0, 256, (150, 3, 4, 4), dtype=torch.uint8)
    found = collect_statistics(
        {"x": Pixels(), "y": Pixels()}, InMemoryImages(images.split(70)), keep_groups=frozenset({"x"}), strata=5
    )
    expected = grouped_moments(images.flatten(1).float(), 5)
    assert [group.count for group in found["x"].groups] == [15] * 10
    for ours, theirs in zip(found["x"].groups, expected, strict=True):
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.products, theirs.products)
    assert found["y"].groups == ()
    torch.testing.assert_close(found["x"].statistics.covariance, found["y"].statistics.covariance)


def test_images_of_several_sizes_are_refused_only_if_the_network_resizes_itself(
    inception_weights: Path, tmp_path: Path
) -> None:
    folder, locator = write_images(tmp_path / "a", 3, 0), WeightsLocator((inception_weights,))
    Image.new("RGB", (40, 40)).save(folder / "small.png")
    collected = collect_statistics({"x": Inception.load("clean", locator)}, ImageSet.open(folder))
    assert collected["x"].statistics.count == 4
    with pytest.raises(UserError, match="inception_legacy_tensorflow needs images of one size"):
        collect_statistics({"x": Inception.load("legacy_tensorflow", locator)}, ImageSet.open(folder))


def test_statistics_of_another_network_are_refused(
    inception_weights: Path, tmp_path: Path, write_script: Callable[[Path, int], None]
) -> None:
    folder, locator = write_images(tmp_path / "a", 4, 0), WeightsLocator((inception_weights,))
    networks = {mode: Inception.load(mode, locator) for mode in ("clean", "legacy_tensorflow")}
    for mode, collected in collect_statistics(networks, ImageSet.open(folder)).items():
        write_statistics(collected, tmp_path / f"{mode}.npz")
    assert read_statistics(tmp_path / "clean.npz", networks["clean"]).statistics.count == 4
    with pytest.raises(UserError, match="features of inception_legacy_tensorflow, not of inception_clean"):
        read_statistics(tmp_path / "legacy_tensorflow.npz", networks["clean"])
    other = tmp_path / "other"
    other.mkdir()
    write_script(other, 1)
    with pytest.raises(UserError, match="with other weights"):
        read_statistics(tmp_path / "clean.npz", Inception.load("clean", WeightsLocator((other,))))


def test_files_that_are_not_statistics_of_the_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="64 features, pixels has 48"):
        read_statistics(tmp_path / "small.npz", Pixels())
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    assert not contains_statistics(tmp_path / "images.npz")
    with pytest.raises(UserError, match="neither mu and sigma nor feats"):
        read_statistics(tmp_path / "images.npz", Pixels())
    (tmp_path / "edm.npz").write_bytes(b"\x80\x04pickle")
    (tmp_path / "empty.npz").touch()
    for read in (contains_statistics, lambda file: read_statistics(file, Pixels())):
        for name in ("edm.npz", "empty.npz"):
            with pytest.raises(UserError, match="Pickles are not read"):
                read(tmp_path / name)


def test_a_file_whose_sigma_is_no_covariance_is_refused(tmp_path: Path) -> None:
    """The distance from it would be clamped to 0, the best score there is."""
    indefinite = np.eye(48)
    indefinite[0, 1] = indefinite[1, 0] = 2
    for sigma, message in ((-np.eye(48), "variance below 0"), (indefinite, "sigma is not a covariance")):
        np.savez(tmp_path / "bad.npz", mu=np.zeros(48), sigma=sigma)
        with pytest.raises(UserError, match=message):
            read_statistics(tmp_path / "bad.npz", Pixels())


def test_features_without_statistics_are_enough(tmp_path: Path) -> None:
    features = normal(9, 48).numpy()
    np.savez(tmp_path / "kid.npz", feats=features)
    assert contains_statistics(tmp_path / "kid.npz")
    read = read_statistics(tmp_path / "kid.npz", Pixels())
    torch.testing.assert_close(read.statistics.mean, torch.from_numpy(features.mean(0)), rtol=1e-5, atol=1e-6)
    assert read.features().shape == (9, 48)
