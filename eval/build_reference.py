"""Creating a reference from images: a feature network, its features of two sets, and some images to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_folder, check_writable, write_tensors, write_text
from fewstep.core.image_data import ImageTable
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.classifier import (
    MAX_CLASSES,
    MAX_WIDTH,
    WEIGHTS,
    accuracy,
    save_classifier,
    train_classifier,
)
from fewstep.eval.networks.features import ClassifierFeatures, ReferenceNetwork, extract_features
from fewstep.eval.networks.image_features import ImageFeatures
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.references import CLASSIFIER, CONFIG, DISTANCE_PREFIX, ReferenceConfig

SIZE, SHOWN, LEARNED = 10_000, 2_000, 60_000  # images at most: compared, kept to look at, learned from
PART = 500  # images decoded at a time
EPOCHS, UPDATES, BATCH = 6, 600, 128  # of a classifier: of small sets more epochs, for as many updates
SMALLEST = 4  # pixels: of fewer the networks' convolutions leave nothing
PER_CLASS = 20  # images from which a classifier can learn something

Progress = Callable[[int, int, float], None]


def held_out(images: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random rows [N] to learn from, and ``share`` of all, at most 10,000, that are held out. Raises ``UserError`` if
    one part would be too small."""
    if not 0 < share < 1:
        raise UserError(f"The share of images to hold out must lie between 0 and 1, got {share}.")
    rows = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    count = min(SIZE, round(share * images))
    if min(count, images - count) < 2:
        raise UserError(
            f"Of {images} images {count} would be held out; both parts need at least 2. Use more images, another share "
            "or images of their own to hold out (test)."
        )
    return rows[count:].sort().values, rows[:count].sort().values


def choose_network(images: ImageTable, rows: Tensor) -> str:
    """The best network that is at hand: a classifier if the images have classes of 20 or more, otherwise an ImageNet
    network if its extra is installed, otherwise random features."""
    classes, counts = images.labels[rows].unique(return_counts=True)
    known = images.class_names or len(classes) == int(classes[-1]) + 1  # not numbers of another kind
    if images.labelled and known and len(classes) > 1 and int(counts.min()) >= PER_CLASS:
        return CLASSIFIER
    try:
        ImageFeatures.load("efficientnet", images.shape, WeightsLocator())
    except UserError:
        return "random"
    return "efficientnet"


def build_reference(
    folder: Path, train: tuple[ImageTable, Tensor], test: tuple[ImageTable, Tensor], *, network: str = CLASSIFIER,
    epochs: int | None = None, seed: int = 0, source: Mapping[str, Any] | None = None,
    locator: WeightsLocator | None = None, device: torch.device | str = "cpu", progress: Progress | None = None,
) -> dict[str, float]:  # fmt: skip
    """Writes the reference folder; ``train`` and ``test`` are tables of images and the rows of them to use.

    A ``classifier`` is trained on ``train``; any other ``network`` has weights (``networks/image_features.py``).
    ``epochs`` are its training's, by default 6, or as many as make 600 updates. ``source`` is a record of the images.
    Returns a classifier's test accuracy, and the distance of at most 10,000 training images from the test images, which
    is the score of a perfect generator.

    Raises ``UserError`` if the images have no labels for a classifier, or weights are missing.
    """
    (images, rows), (other, other_rows) = train, test
    if min(images.shape[1:]) < SMALLEST:
        raise UserError(
            f"Images of {images.shape[1]} x {images.shape[2]} are too small: {SMALLEST} x {SMALLEST} or more."
        )
    used: ReferenceNetwork | None = None
    if network == CLASSIFIER:
        _check_labels(train, test)
    else:
        used = ImageFeatures.load(network, images.shape, locator or WeightsLocator.from_environment(), device)
    check_writable(folder / WEIGHTS)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    values: dict[str, float] = {}
    with atomic_folder(folder, new=True) as part:
        if used is None:
            values["test_accuracy"] = _write_classifier(
                part, folder.name, (images, rows), (other, other_rows), epochs=epochs, seed=seed, progress=progress
            )
            used = ClassifierFeatures.load(part)
        compared = {"train": (images, shuffled[:SIZE]), "test": (other, other_rows[:SIZE])}
        features = {split: _features(used, *some) for split, some in compared.items()}
        statistics = {split: Statistics.of(rows_of) for split, rows_of in features.items()}
        write_tensors({"features": features["test"]}, part / "test.safetensors")
        write_tensors(stored_statistics(statistics["train"]), part / "train.safetensors")
        few = shuffled[SIZE : SIZE + SHOWN]
        pixels, labels = images[few if len(few) else shuffled[:SHOWN]]
        write_tensors({"images": pixels, "labels": labels.to(torch.int32)}, part / "real.safetensors")
        config = ReferenceConfig(
            network=network, network_sha256=used.sha256, shape=images.shape, class_names=images.class_names,
            images={**(source or {}), "train": len(rows), "test": len(other_rows)},
        )  # fmt: skip
        write_text(config.model_dump_json(indent=2) + "\n", part / CONFIG)
    distance = frechet_distance(statistics["train"], statistics["test"])
    return values | {DISTANCE_PREFIX + used.name: distance}


def stored_statistics(statistics: Statistics) -> dict[str, Tensor]:
    """What ``train.safetensors`` contains: training compares statistics only, which take less space than features."""
    return {
        "mean": statistics.mean, "covariance": statistics.covariance, "count": torch.tensor([statistics.count]),
    }  # fmt: skip


def _check_labels(train: tuple[ImageTable, Tensor], test: tuple[ImageTable, Tensor]) -> None:
    if max(train[0].shape) > MAX_WIDTH:
        raise UserError(
            f"Images of {train[0].shape[1]} x {train[0].shape[2]} are too large for a classifier, which takes at most "
            f"{MAX_WIDTH:,} pixels along a side: use another --network, or a smaller --size."
        )
    for images, rows in (train, test):
        if (highest := max(int(images.labels[rows].max()), len(images.class_names) - 1)) >= MAX_CLASSES:
            raise UserError(
                f"{images.rows.name} has the label {highest} in {images.rows.label_column}, and a classifier has at "
                f"most {MAX_CLASSES:,} classes, numbered from 0: name another column of labels, or use another "
                "--network."
            )
        if not images.labelled or len(images.labels[rows].unique()) < 2:
            raise UserError(
                f"{images.rows.name} has no labels of two classes for a classifier: use another --network, or name the "
                "column of labels."
            )
    if set(test[0].labels[test[1]].tolist()) - set(train[0].labels[train[1]].tolist()):
        raise UserError("The test images have classes that the training images lack.")


def _write_classifier(
    folder: Path, name: str, train: tuple[ImageTable, Tensor], test: tuple[ImageTable, Tensor], *, epochs: int | None,
    seed: int, progress: Progress | None,
) -> float:  # fmt: skip
    """Trains a classifier, writes it and returns its accuracy (0..1) on the test images."""
    pixels, labels = _pixels(*train)
    epochs = epochs or max(EPOCHS, -(-UPDATES // -(-len(pixels) // BATCH)))
    network = train_classifier(
        pixels, labels, epochs=epochs, seed=seed, classes=len(train[0].class_names) or None, batch=BATCH,
        progress=progress,
    )  # fmt: skip
    found = accuracy(network, *_pixels(*test))
    save_classifier(
        network, folder, name=name, shape=train[0].shape,
        training={"epochs": epochs, "seed": seed, "test_accuracy": found},
    )  # fmt: skip
    return found


def _pixels(images: ImageTable, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of rows: of as many as a classifier needs, evenly spread."""
    return images[rows[:: -(-len(rows) // LEARNED)]]


def _features(network: ReferenceNetwork, images: ImageTable, rows: Tensor) -> Tensor:
    """Features of rows of a table, float32 [n, D]."""
    return torch.cat([extract_features(network, images[some][0]) for some in rows.split(PART)])
