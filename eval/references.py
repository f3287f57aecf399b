"""Reference sets, with which generated images are compared. They are files; nothing is downloaded.

A reference folder contains the evaluator's classifier, its features of two sets of real images (``test``, which only
evaluation uses, and ``train``, by which training chooses its best checkpoint) and some real images to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import atomic_folder, check_writable, read_tensors, sha256, write_tensors
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.classifier import WEIGHTS, accuracy, save_classifier, train_classifier
from fewstep.eval.networks.features import REFERENCES, ClassifierFeatures, extract_features

Split = Literal["test", "train"]
DISTANCE_PREFIX = "fd_"  # of Fréchet distances: "FID" is reserved for Inception's


@dataclass(frozen=True)
class Reference:
    """Features [N, D] of one set of real images, their statistics, the network that computed them, and the hash of
    their file."""

    name: str
    split: Split
    network: ClassifierFeatures
    features: Tensor
    statistics: Statistics
    sha256: str

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance of these features."""
        return DISTANCE_PREFIX + self.network.name


def bundled_references() -> list[str]:
    """The names of the references that ship with the package."""
    return sorted(folder.name for folder in REFERENCES.iterdir() if (folder / "test.safetensors").is_file())


def load_reference(name: str, split: Split = "test", device: torch.device | str = "cpu") -> Reference:
    """A bundled reference by name, or a reference folder. Raises ``UserError`` if it is missing or damaged."""
    folder = _folder(name)
    if not (folder / f"{split}.safetensors").is_file():
        raise UserError(f"No reference {name!r}{nearest(name, bundled_references())}.")
    network = ClassifierFeatures.load(folder, device)
    file = folder / f"{split}.safetensors"
    features = read_tensors(file).get("features", torch.empty(0))
    if features.ndim != 2 or not features.is_floating_point():
        raise UserError(f"{file} contains no features [N, D]; create the reference again with fewstep data reference.")
    if features.shape[1] != network.dimension:
        raise UserError(
            f"{folder} contains features of dimension {features.shape[1]}, but its classifier has {network.dimension}."
        )
    return Reference(name, split, network, features, Statistics.of(features), sha256(file))


def real_images(name: str) -> tuple[Tensor, Tensor]:
    """Some real images of a reference, uint8 [N, C, H, W], and their labels, int64 [N]."""
    file = _folder(name) / "real.safetensors"
    tensors = read_tensors(file)
    images, labels = (tensors.get(key, torch.empty(0)) for key in ("images", "labels"))
    if images.ndim != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{file} contains no images with labels; create the reference again with fewstep data reference."
        )
    return images, labels.long()


def _folder(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else REFERENCES / name


def build_reference(
    folder: Path, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, epochs: int, seed: int,
    size: int = 10_000, shown: int = 2_000, progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Trains the classifier on ``train`` and writes the reference folder.

    ``train`` and ``test`` are images, uint8 [N, C, H, W], with their labels [N]. Returns the test accuracy and the
    distance of ``size`` training images from the test images, which is the score of a perfect generator.
    """
    check_writable(folder / WEIGHTS)
    network = train_classifier(*train, epochs=epochs, seed=seed, progress=progress)
    record = {"epochs": epochs, "seed": seed, "test_accuracy": accuracy(network, *test)}
    shape = tuple(train[0].shape[1:])
    with atomic_folder(folder) as part:
        save_classifier(network, part, name=name, shape=shape, training=record)  # type: ignore[arg-type]
        loaded = ClassifierFeatures.load(part)
        rows = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
        features = {
            "train": extract_features(loaded, train[0][rows[:size]]),
            "test": extract_features(loaded, test[0][:size]),
        }
        for split, values in features.items():
            write_tensors({"features": values}, part / f"{split}.safetensors")
        few = rows[size : size + shown]
        write_tensors({"images": train[0][few], "labels": train[1][few].to(torch.uint8)}, part / "real.safetensors")
    distance = frechet_distance(Statistics.of(features["train"]), Statistics.of(features["test"]))
    return {"test_accuracy": record["test_accuracy"], DISTANCE_PREFIX + name: distance}
