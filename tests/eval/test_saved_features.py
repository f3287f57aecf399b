"""An interrupted evaluation of images continues where it stopped, and only on the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_sets import write_images
from torch import Tensor

from fewstep.eval import saved_features
from fewstep.eval.feature_statistics import collect_statistics
from fewstep.eval.images import ImageSet
from fewstep.eval.saved_features import SavedFeatures

IMAGES = 70


class Means:
    """Features that count their images, and stop after some."""

    name, sha256, dimension = "means", "ab", 3

    def __init__(self, stop_after: int = 10_000) -> None:
        self.computed, self.stop_after = 0, stop_after

    def prepare(self, image: Tensor) -> Tensor:
        return image.float().mean((1, 2))

    def __call__(self, images: Tensor) -> Tensor:
        self.computed += len(images)
        if self.computed > self.stop_after:
            raise KeyboardInterrupt
        return images.clone()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(saved_features, "PART_IMAGES", 16)
    folder = write_images(tmp_path / "images", IMAGES, 0, 8)
    (folder / "005.png").write_bytes(b"no image")
    return folder


def collect(folder: Path, work: Path, network: Means) -> tuple[Tensor, str, dict[str, str]]:
    opened = ImageSet.open(folder, skip_bad=True)
    saved = SavedFeatures.of(work, opened, {"x": network})
    collected = collect_statistics({"x": network}, opened, frozenset({"x"}), saved=saved)["x"]
    return collected.features(), opened.sha256, opened.done.skipped


def interrupted(folder: Path, work: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(folder, work, Means(after))


def test_finished_parts_are_not_computed_again(images: Path, tmp_path: Path) -> None:
    expected, digest, skipped = collect(images, tmp_path / "none", Means())
    interrupted(images, tmp_path / "work", 50)
    network = Means()
    features, resumed_digest, resumed_skipped = collect(images, tmp_path / "work", network)
    assert torch.equal(features, expected)
    assert (resumed_digest, resumed_skipped) == (digest, skipped)
    assert set(skipped) == {"005.png"}
    assert 0 < network.computed < IMAGES - 16


def test_an_evaluation_interrupted_twice_is_complete(images: Path, tmp_path: Path) -> None:
    expected, *_ = collect(images, tmp_path / "none", Means())
    interrupted(images, tmp_path / "work", 20)
    interrupted(images, tmp_path / "work", 20)
    assert torch.equal(collect(images, tmp_path / "work", Means())[0], expected)


@pytest.mark.parametrize("change", ["image", "network", "damage"])
def test_parts_of_other_images_or_networks_are_not_used(change: str, images: Path, tmp_path: Path) -> None:
    interrupted(images, tmp_path / "work", 50)
    network = Means()
    if change == "image":
        (images / "000.png").write_bytes((images / "069.png").read_bytes() + b" ")
    elif change == "network":
        network.sha256 = "cd"
    else:
        (tmp_path / "work" / "part-00000.safetensors").write_bytes(b"no")
    collect(images, tmp_path / "work", network)
    assert network.computed == IMAGES - 1
