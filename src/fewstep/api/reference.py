"""References: the one by which a model is scored, and making one from images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.api.models import Source, run_of
from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.files import require_empty
from fewstep.core.image_data import ImageData, ImageTable, first_shape, kind_of, open_images
from fewstep.core.paths import overlap
from fewstep.distill.run_folder import run_settings
from fewstep.eval.build_reference import build_reference, choose_network, held_out
from fewstep.eval.networks.features import ClassifierFeatures, MissingClassifier
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.references import CLASSIFIER, OF_BUNDLED, load_reference


def reference_for(source: Source, given: str | None = None) -> str:
    """The reference by which a model is scored: the one ``given``, that of its run's validation, or that of the bundled
    model, or run, that its run distils. Raises ``UserError`` that says how to make one."""
    if (found := given or known_reference(source)) is None:
        raise UserError(
            f"No reference is known for {source}: give --reference FOLDER, which fewstep data reference makes from "
            "images, or --protocol."
        )
    return found


def classifier_for(source: Source, given: str | None, device: torch.device) -> ClassifierFeatures:
    """The classifier of a model's reference, for rewards; if none is known, one that refuses to classify."""
    found = given or known_reference(source)
    return load_reference(found, "train", device).classifier if found is not None else MissingClassifier()


def known_reference(source: Source, seen: frozenset[str] = frozenset()) -> str | None:
    """The reference of a bundled model, or of a run: that of its validation, or that of its teacher; None if there is
    none. ``seen`` are the runs that led here."""
    if str(source) in seen:
        return None
    if (bundled := OF_BUNDLED.get(str(source))) is not None:
        return bundled
    run = run_of(source)
    settings = run_settings(run) if run is not None else {}
    validation, teacher = settings.get("validation"), settings.get("teacher")
    if isinstance(validation, dict) and isinstance(reference := validation.get("reference"), str):
        return reference
    return known_reference(teacher, seen | {str(source)}) if isinstance(teacher, str) else None


def training_reference(reference: str | None, teacher: str | None) -> str | None:
    """The reference of a run's validation: the one given, or that of its teacher; None if there is none."""
    return reference or (known_reference(teacher) if teacher is not None else None)


def make_reference(
    images: ImageData | Source, out: Source, *, test: ImageData | Source | None = None, share: float = 0.2,
    size: tuple[int, int] | None = None, channels: int | None = None, network: str | None = None,
    epochs: int | None = None, seed: int = 0, weights: Source | None = None, device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Writes a reference folder: features of images, by which models are scored and the best student is chosen, and
    some of the images.

    ``images`` are learned from, ``test`` are held out: by default idx images of the test files, and otherwise a random
    ``share`` of ``images``, in which a file that has several rows of a table counts once. They have ``size`` (height,
    width) and ``channels`` (1: grey, 3: RGB), by default those of the first image. ``network`` is ``classifier``, which
    is trained on the images' labels, ``efficientnet``, ``dinov2``, ``inception`` or ``random``; by default the best
    that is at hand (see ``build_reference``); ``weights`` is a folder with its weights.

    Returns a classifier's test accuracy, and the score of real images. Raises ``UserError`` before anything is computed
    if the images cannot be read or some of them are test images, or weights are missing.
    """
    folder = Path(out)
    require_empty(folder)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be from 0 to 2**63 - 1, got {seed}.")
    data, held_images = _image_data(images), _image_data(test) if test is not None else None
    if data.kind == "folder" and folder.resolve().is_relative_to(Path(data.path).resolve()):
        raise UserError(f"{folder} is inside {data.path}, of which each subfolder is a class: choose another folder.")
    shape = _shape_of(data, size, channels)
    table = open_images(data, shape)
    if table.rows.unlabelled is not None and network in (None, CLASSIFIER):
        raise UserError(table.rows.unlabelled)
    if held_images is None and data.kind == "idx" and data.split == "train":
        held_images = replace(data, split="test")
    if held_images is None:
        distinct = _distinct(table)
        rows, others = (distinct[part] for part in held_out(len(distinct), share, seed))
        other = table
    else:
        _check_places(data, held_images)
        other = open_images(held_images, table.shape)
        _check_files(table, other)
        _check_classes(table, other)
        rows, others = torch.arange(len(table)), torch.arange(len(other))
    source = {"kind": data.kind, "name": Path(data.path).name, "split": data.split, "crop": data.crop}
    locator = WeightsLocator.from_environment(Path(weights) if weights is not None else None)
    chosen = network or (CLASSIFIER if data.kind == "idx" else choose_network(table, rows))
    return build_reference(
        folder, (table, rows), (other, others), network=chosen, epochs=epochs, seed=seed,
        source=source, locator=locator, device=pick_device(device), progress=progress,
    )  # fmt: skip


def _place(data: ImageData) -> tuple[str, Path, str, str | None, str | None]:
    return data.kind, Path(data.path).resolve(), data.split, data.subset, data.columns.image


def _check_places(images: ImageData, test: ImageData) -> None:
    """Raises ``UserError`` if both are one set, or one is a table of images that lies inside the other's folder."""
    if _place(images) == _place(test):
        raise UserError(f"The test images are the images themselves ({images.path}): leave test out to hold out some.")
    own, other = Path(images.path), Path(test.path)
    if images.kind == test.kind == "dataset" and own.is_dir() | other.is_dir() and own != other and overlap(own, other):
        inner, outer = (other, own) if other.resolve().is_relative_to(own.resolve()) else (own, other)
        raise UserError(f"{inner} lies inside {outer}, so that test images may be among the images: move it out.")


def _check_files(images: ImageTable, test: ImageTable) -> None:
    """Raises ``UserError`` if an image file belongs to both sets."""
    if shared := set(images.rows.paths()).intersection(test.rows.paths()):
        raise UserError(
            f"{min(shared, key=str)} is one of the images and one of the test images ({len(shared):,} of both are): "
            f"nothing may learn from test images. Take them out of {images.rows.name}, or leave test out to hold out "
            "some."
        )


def _distinct(images: ImageTable) -> Tensor:
    """The first row, int64 [N], of each image file: a table may have several, with a caption each."""
    files = images.rows.paths() or range(len(images))
    first = {file: row for row, file in reversed(list(enumerate(files)))}
    return torch.tensor(sorted(first.values()))


def _check_classes(images: ImageTable, test: ImageTable) -> None:
    """Raises ``UserError`` if both sets have labels, but not of the same classes."""
    if not (images.labelled and test.labelled):
        return
    ours, theirs = (
        [table.class_names[k] if table.class_names else str(k) for k in table.labels.unique().tolist()]
        for table in (images, test)
    )
    if ours != theirs:
        raise UserError(
            f"The test images have the classes {', '.join(theirs)}, the others {', '.join(ours)}: both need the same."
        )


def _image_data(images: ImageData | Source) -> ImageData:
    return images if isinstance(images, ImageData) else ImageData(kind_of(str(images)), str(images))


def _shape_of(data: ImageData, size: tuple[int, int] | None, channels: int | None) -> tuple[int, ...] | None:
    """The shape [C, H, W] that is asked for; None for that of the first image."""
    if size is None and channels is None:
        return None
    first = first_shape(data)
    return (channels or first[0], *(size or first[1:]))
