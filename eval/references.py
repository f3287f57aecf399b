"""Reference sets: what generated images are compared with. Files only, nothing is downloaded.

A reference folder holds the evaluator's classifier, features and statistics of two sets of real images (``test``, which
only ``eval`` reads, and ``train``, by which the best checkpoint is chosen) and some real images to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import check_writable, read_tensors, write_tensors
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.classifier import WEIGHTS, accuracy, save_classifier, train_classifier
from fewstep.eval.networks.features import REFERENCE, ClassifierFeatures, extract

Split = Literal["test", "train"]


@dataclass(frozen=True)
class Reference:
    """Features [N, D] of one set of real images with their statistics, and the network that made them."""

    name: str
    split: Split
    network: ClassifierFeatures
    features: Tensor
    statistics: Statistics

    @property
    def metric(self) -> str:
        """What a Fréchet distance in these features is called: never "FID", which means Inception's."""
        return f"fd_{self.network.name}"


def references() -> list[str]:
    return sorted(folder.name for folder in REFERENCE.iterdir() if (folder / "test.safetensors").is_file())


def load_reference(name: str, split: Split = "test", device: torch.device | str = "cpu") -> Reference:
    """An embedded reference by name, or a reference folder. Raises ``UserError`` if there is none or it is damaged."""
    folder = Path(name) if Path(name).is_dir() else REFERENCE / name
    if not (folder / f"{split}.safetensors").is_file():
        raise UserError(f"No reference {name!r}{nearest(name, references())}.")
    network = ClassifierFeatures.load(folder, device)
    features = read_tensors(folder / f"{split}.safetensors")["features"]
    if features.shape[1] != network.dimension:
        raise UserError(f"{folder}: features of dimension {features.shape[1]} are not those of its classifier.")
    return Reference(name, split, network, features, Statistics.of(features))


def real_images(name: str) -> tuple[Tensor, Tensor]:
    """Some real images of a reference, uint8 [N, C, H, W], and their labels."""
    folder = Path(name) if Path(name).is_dir() else REFERENCE / name
    tensors = read_tensors(folder / "real.safetensors")
    return tensors["images"], tensors["labels"].long()


def build_reference(
    folder: Path,
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    seed: int,
    size: int = 10_000,
    shown: int = 2_000,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Trains the classifier on ``train`` and writes the reference folder. Returns accuracy and the distance of ``size``
    training images from the test images, which is what a perfect generator would score."""
    check_writable(folder / WEIGHTS)
    network = train_classifier(*train, epochs=epochs, seed=seed, progress=progress)
    record = {"epochs": epochs, "seed": seed, "test_accuracy": accuracy(network, *test)}
    save_classifier(network, folder, name=name, shape=tuple(train[0].shape[1:]), training=record)  # type: ignore[arg-type]
    loaded = ClassifierFeatures.load(folder)
    rows = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    features = {"train": extract(loaded, train[0][rows[:size]]), "test": extract(loaded, test[0][:size])}
    for split, values in features.items():
        write_tensors({"features": values}, folder / f"{split}.safetensors")
    few = rows[size : size + shown]
    write_tensors({"images": train[0][few], "labels": train[1][few].to(torch.uint8)}, folder / "real.safetensors")
    distance = frechet_distance(Statistics.of(features["train"]), Statistics.of(features["test"]))
    return {"test_accuracy": record["test_accuracy"], f"fd_{name}": distance}
