"""The classifier of a reference: training, saving, loading, and the errors if its files are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import sha256
from fewstep.eval.networks.classifier import (
    CONFIG,
    WEIGHTS,
    Classifier,
    _shift_randomly,
    accuracy,
    save_classifier,
    train_classifier,
)
from fewstep.eval.networks.features import ClassifierFeatures, extract_features

WIDTHS = (4, 8, 8, 8)


def stripes(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images with a bright row (label 0) or column (label 1) somewhere: uint8 [n, 1, 16, 16], int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (n, 1, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 2, (n,), generator=generator)
    starts = torch.randint(2, 13, (n,), generator=generator)
    for image, label, start in zip(images[:, 0], labels, starts, strict=True):
        (image if label == 0 else image.T)[start : start + 2] = 255
    return images, labels


def trained(seed: int = 0, epochs: int = 4) -> Classifier:
    return train_classifier(*stripes(600), epochs=epochs, seed=seed, widths=WIDTHS, batch=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_classifier(Classifier(widths=WIDTHS), tmp_path, name="tiny", shape=(1, 16, 16), training={"epochs": 0})
    return tmp_path


def test_training_learns_what_separates_the_classes() -> None:
    assert accuracy(trained(), *stripes(300, seed=1)) > 0.95


def test_training_depends_only_on_its_seed_and_leaves_the_global_random_state() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = trained(epochs=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = trained(epochs=1).state_dict(), trained(seed=1, epochs=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_progress_counts_all_steps() -> None:
    calls: list[tuple[int, int]] = []
    train_classifier(
        *stripes(100), epochs=2, seed=0, widths=WIDTHS, batch=40,
        progress=lambda step, steps, _: calls.append((step, steps)),
    )  # fmt: skip
    assert calls == [(i, 6) for i in range(1, 7)]


def test_augmentation_shifts_an_image_by_up_to_one_pixel_in_each_direction() -> None:
    images = torch.zeros(300, 1, 5, 5, dtype=torch.uint8)
    images[:, 0, 2, 2] = 255
    shifted = _shift_randomly(images, 1, torch.Generator().manual_seed(0))
    assert (shifted > 0).sum(dim=(1, 2, 3)).tolist() == [1] * 300
    assert (shifted > 0).any(dim=0)[0].tolist() == [[1 <= i <= 3 and 1 <= j <= 3 for j in range(5)] for i in range(5)]


def test_no_batch_contains_a_single_image() -> None:
    """41 images in batches of 20 or fewer are 13 + 14 + 14: batch normalisation refuses a single one."""
    train_classifier(*stripes(41), epochs=1, seed=0, widths=WIDTHS, batch=20)


def test_the_default_network_is_small() -> None:
    network = Classifier()
    assert network.dimension == 64
    assert sum(p.numel() for p in network.parameters()) <= 250_000


def test_features_of_a_saved_classifier_are_those_of_the_network(tmp_path: Path) -> None:
    network, (images, _) = trained(epochs=1), stripes(20)
    save_classifier(network, tmp_path, name="stripes", shape=(1, 16, 16), training={})
    features = ClassifierFeatures.load(tmp_path)
    assert (features.name, features.dimension, features.sha256) == ("stripes", 64, sha256(tmp_path / WEIGHTS))
    assert torch.equal(features(images), network.features(images))
    assert torch.equal(features.classes(features(images)), network(images).argmax(1))
    assert not features(images).requires_grad


def test_features_do_not_depend_on_the_batch(folder: Path) -> None:
    features, (images, _) = ClassifierFeatures.load(folder), stripes(23)
    expected = extract_features(features, images)
    assert (expected.shape, expected.dtype) == ((23, 64), torch.float32)
    torch.testing.assert_close(extract_features(features, images, batch=5), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(extract_features(features, images.flip(0)).flip(0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 1, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 16, 16, dtype=torch.uint8)],
    ids=["not bytes", "colour", "no channel axis"],
)
def test_images_of_another_shape_or_type_are_refused(folder: Path, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"'tiny' need uint8 images of shape \[1, 16, 16\]"):
        ClassifierFeatures.load(folder)(images)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS} does not exist"):
        ClassifierFeatures.load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(UserError, match=f"{CONFIG} does not exist"):
        ClassifierFeatures.load(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{WEIGHTS} is not a readable safetensors file"):
        ClassifierFeatures.load(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "Invalid JSON"), ('{"name": "x"}', "shape: Field required"), ("\x00\xff", "Invalid JSON")],
    ids=["cut off", "another format", "binary"],
)
def test_a_damaged_description_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"{CONFIG} is not a readable description of a classifier \({reason}"):
        ClassifierFeatures.load(folder)


def test_a_description_of_another_network_is_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "widths": [4, 8, 8, 16]}))
    with pytest.raises(UserError, match="has shape"):
        ClassifierFeatures.load(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        save_classifier(Classifier(widths=WIDTHS), tmp_path / "file", name="x", shape=(1, 16, 16), training={})
