"""Networks that turn images into features, so that every metric is a plain function of matrices [N, D]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import sha256
from fewstep.eval.networks.classifier import WEIGHTS, Classifier, load_classifier

REFERENCES = Path(__file__).parents[1] / "reference"


class FeatureNetwork(Protocol):
    """Maps images to features, float32 [N, ``dimension``]: ``network(torch.stack([network.prepare(image), ...]))``.

    ``prepare`` takes one image, uint8 [3, H, W] in 0..255 (or a video, uint8 [F, 3, H, W]), on the host, in several
    threads. The memory of the stack is reused, so the features must not share it. ``sha256`` is the hash of the
    weights' file: values are comparable only if ``name`` and ``sha256`` agree.
    """

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def prepare(self, image: Tensor) -> Tensor: ...
    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFeatures:
    """The penultimate layer of a reference's classifier, before its activation: smooth, unbounded, standardised.

    ``name`` is part of the name of its Fréchet distance (``fd_fashion``).
    """

    name: str
    sha256: str
    shape: tuple[int, int, int]
    network: Classifier

    @classmethod
    def load(cls, folder: str | Path = REFERENCES / "fashion", device: torch.device | str = "cpu") -> Self:
        """Reads ``classifier.json`` and ``classifier.safetensors``.

        Raises ``UserError`` if one is missing or damaged or if they do not belong together.
        """
        network, config = load_classifier(folder)
        return cls(config.name, sha256(Path(folder) / WEIGHTS), config.shape, network.to(device))

    @property
    def dimension(self) -> int:
        return self.network.dimension

    @property
    def classes_count(self) -> int:
        return self.network.head.out_features

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] on any device -> float32 [N, D] on the network's. Raises ``UserError`` on other
        images."""
        require_images(self.name, images, self.shape)
        # TF32, cuDNN's default, keeps 10 bits, which would change a distance between distributions
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network.features(images.to(self.network.device))

    def classes(self, features: Tensor) -> Tensor:
        """The most likely class for each row of features [N, D], int64 [N] on the host."""
        with torch.no_grad():
            return self.network.classify(features.to(self.network.device)).argmax(1).cpu()


class MissingClassifier(ClassifierFeatures):
    """Stands for a reference's classifier where no reference is known: rewards that need none work without."""

    def __init__(self) -> None:
        super().__init__("none", "none", (1, 1, 1), Classifier(widths=(1, 1, 1, 1), dimension=1))

    def __call__(self, images: Tensor) -> Tensor:
        raise UserError(
            "This reward needs the classifier of a reference, and none is known for the model: give --reference "
            "FOLDER, which fewstep data reference makes from images, or another reward."
        )


class ReferenceNetwork(Protocol):
    """Maps images of one ``shape`` [C, H, W], uint8 [N, C, H, W], to features, float32 [N, ``dimension``]. ``name`` is
    part of the name of their Fréchet distance; values are comparable only if ``name`` and ``sha256`` agree."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dimension(self) -> int: ...
    def __call__(self, images: Tensor) -> Tensor: ...


def require_images(name: str, images: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ``UserError`` unless images are uint8 and of ``shape`` [C, H, W]."""
    if images.dtype != torch.uint8 or images.shape[1:] != shape:
        raise UserError(
            f"The features {name!r} need uint8 images of shape {list(shape)}, "
            f"got {images.dtype} of shape {list(images.shape[1:])}: choose a reference of such images."
        )


def extract_features(network: ReferenceNetwork, images: Tensor, batch: int = 500) -> Tensor:
    """Features of many images, uint8 [N, C, H, W] -> float32 [N, D] on the host, ``batch`` images at a time."""
    return torch.cat([network(part).cpu() for part in images.split(batch)])


def as_matrices(*sets: Tensor) -> list[Tensor]:
    """Sets of features [N_i, D] as float64 on the host, which is what metrics compute with.

    Raises ``UserError`` unless each has two rows or more, all have the same D, and every number is finite.
    """
    for x in sets:
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != sets[0].shape[1]:
            raise UserError(
                f"Features to compare must be [N, D] with N >= 2 and the same D, got {[list(s.shape) for s in sets]}."
            )
    return [as_finite(x) for x in sets]


def as_finite(features: Tensor) -> Tensor:
    """Features [N, D] as float64 on the host. Raises ``UserError`` if a number is not finite."""
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(dim=1)).sum())
        raise UserError(f"The features of {bad} of {len(features)} images are NaN or infinite; check the images.")
    return features.detach().to("cpu", torch.float64)
