"""Features behind one small protocol, so that every metric is a plain function of matrices [N, D]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import sha256
from fewstep.eval.networks.classifier import WEIGHTS, Classifier, load_classifier

REFERENCE = Path(__file__).parent / "reference"


class Features(Protocol):
    """Maps images to float32 [N, ``dimension``], each by itself: ``network(stack of network.prepare(image))``.

    ``prepare`` takes one image, uint8 [3, H, W] in 0..255 (or a video, uint8 [F, 3, H, W]), on the host, where several
    threads share the work. ``name`` becomes part of the metric's name (``fd_fashion``); ``sha256`` is that of the
    weights file: values are comparable only where both agree.
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
    """The penultimate layer of an embedded classifier, before its activation: smooth, unbounded, standardised."""

    name: str
    sha256: str
    shape: tuple[int, int, int]
    network: Classifier

    @classmethod
    def load(cls, folder: str | Path = REFERENCE / "fashion", device: torch.device | str = "cpu") -> ClassifierFeatures:
        """Reads ``classifier.json`` and ``classifier.safetensors``.

        Raises ``UserError`` when one is missing or damaged or when they do not belong together.
        """
        network, config = load_classifier(folder)
        return cls(config.name, sha256(Path(folder) / WEIGHTS), config.shape, network.to(device))

    @property
    def dimension(self) -> int:
        return self.network.dimension

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] on any device -> float32 [N, D] on the network's. ``UserError`` on other images."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            raise UserError(
                f"The features {self.name!r} need uint8 images of shape {list(self.shape)}, "
                f"got {images.dtype} of shape {list(images.shape[1:])}."
            )
        # TF32, which cuDNN uses unless told otherwise, keeps 10 bits: enough to move a distance between distributions
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network.features(images.to(self.network.device))

    def classes(self, features: Tensor) -> Tensor:
        """The likeliest class of each of these features [N, D], int64 [N] on the host."""
        with torch.no_grad():
            return self.network.classify(features.to(self.network.device)).argmax(1).cpu()


def extract(features: ClassifierFeatures, images: Tensor, batch: int = 500) -> Tensor:
    """Features of many images, uint8 [N, C, H, W] -> float32 [N, D] on the host, ``batch`` images at a time."""
    return torch.cat([features(part).cpu() for part in images.split(batch)])


def matrices(*sets: Tensor) -> list[Tensor]:
    """Sets of features [N_i, D] as float64 on the host, as the metrics take them.

    Raises ``UserError`` unless each has two rows or more, all have one dimension D and every number is finite.
    """
    for x in sets:
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != sets[0].shape[1]:
            raise UserError(
                f"Features to compare must be [N, D] with N >= 2 and one D, got {[list(s.shape) for s in sets]}."
            )
    return [finite(x) for x in sets]


def finite(features: Tensor) -> Tensor:
    """Features [N, D] as float64 on the host. Raises ``UserError`` if a number is not finite."""
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(dim=1)).sum())
        raise UserError(f"The features of {bad} of {len(features)} images are NaN or infinite: were the images valid?")
    return features.detach().to("cpu", torch.float64)
