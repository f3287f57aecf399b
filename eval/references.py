"""Reference sets, with which generated images are compared. They are files; nothing is downloaded.

A reference folder contains features of real images, which only evaluation uses (``test``), the statistics of those of
others, by which training chooses its best checkpoint (``train``), some real images to look at, and either a classifier
trained on them or, in ``reference.json``, the name of the network that computed the features. ``fewstep data
reference`` writes one. The real images of the emoji are rendered instead, and their folder contains a classifier only
(``eval/emoji.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import read_tensors, reading, sha256
from fewstep.core.paths import nearest_folder
from fewstep.eval import clip_scores, emoji
from fewstep.eval.clip_scores import clip_features, summarise
from fewstep.eval.metrics.frechet import Statistics
from fewstep.eval.networks.features import (
    REFERENCES,
    ClassifierFeatures,
    ReferenceNetwork,
    extract_features,
    require_images,
)
from fewstep.eval.networks.image_features import ImageFeatures
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.models import emoji_clips
from fewstep.models.emoji import EmojiCaptions
from fewstep.models.emoji_clips import ClipCaptions
from fewstep.models.model_config import ModelConfig

Split = Literal["test", "train"]
CONFIG, CLASSIFIER = "reference.json", "classifier"
# The references of bundled models.
OF_BUNDLED = {"fashion": "fashion", "fashion-text": "fashion", "emoji": "emoji", "emoji-video": "emoji-video"}
RENDERED = (*emoji.SPLITS, *clip_scores.SPLITS)  # references whose images are rendered for captions
DISTANCE_PREFIX = "fd_"  # of Fréchet distances: "FID" is reserved for Inception's


class ReferenceConfig(BaseModel):
    """``reference.json``: the network, ``classifier`` or one of ``networks/image_features.py``, with the hash of its
    weights; the shape [C, H, W] of the images, the names of their classes, and a record of their source."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fewstep-reference"] = "fewstep-reference"
    network: str
    network_sha256: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    images: dict[str, Any] = {}


@dataclass(frozen=True)
class Reference:
    """Features [N, D] of one set of real images, their statistics, the network that computed them, and the hash of
    their file. There are no features (N = 0) where a file has their statistics only. ``class_names`` are those of the
    classifier's classes, if they have some; ``captions`` those that the images show in turn, if they were rendered for
    some."""

    name: str
    split: Split
    network: ReferenceNetwork
    features: Tensor
    statistics: Statistics
    sha256: str
    class_names: tuple[str, ...] = ()
    captions: EmojiCaptions | ClipCaptions | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the samples of a model that it scores: [C, H, W], or [C, F, H, W] of clips."""
        return emoji_clips.SHAPE if isinstance(self.captions, ClipCaptions) else self.network.shape

    def extract(self, samples: Tensor) -> Tensor:
        """The features, float32 [N, D], of images, uint8 [N, C, H, W], or of clips, uint8 [N, C, F, H, W]."""
        return extract(self.network, samples)

    @property
    def classifier(self) -> ClassifierFeatures:
        """The network. Raises ``UserError`` if it is none that classifies images."""
        if not isinstance(self.network, ClassifierFeatures):
            raise UserError(
                f"The reference {self.name} compares features of {self.network.name} and has no classifier: make one "
                "with fewstep data reference --network classifier."
            )
        return self.network

    def require_fit(self, model: ModelConfig) -> None:
        """Raises ``UserError`` if samples of a model are not images like those of the reference: of the same shape, of
        the same classes where both have some, and of its captions if the model takes words."""
        require_images(self.network.name, torch.zeros(1, *model.shape, dtype=torch.uint8), self.shape)
        if model.vocabulary is not None:
            if self.captions is None:
                raise UserError(
                    f"The reference {self.name} has no captions; this model takes words of its own. A model "
                    f"that knows the words of emoji is scored by --reference {' or '.join(RENDERED)}, another by a "
                    "protocol with captions of its words."
                )
            model.vocabulary.encode(self.captions.texts)
        classes = self.network.classes_count if isinstance(self.network, ClassifierFeatures) else 0
        if classes and model.classes and classes != model.classes:
            raise UserError(
                f"The model has {model.classes} classes and the reference {self.name} {classes}: make one of images of "
                "the model's classes with fewstep data reference."
            )
        ours, theirs = model.class_names, self.class_names
        if ours and theirs and tuple(ours) != tuple(theirs):
            raise UserError(
                f"The model's classes ({', '.join(ours)}) are not those of the reference {self.name} "
                f"({', '.join(theirs)})."
            )

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance of these features."""
        return DISTANCE_PREFIX + self.network.name


def extract(network: ReferenceNetwork, samples: Tensor) -> Tensor:
    """The features, float32 [N, D], of images, uint8 [N, C, H, W], or of clips, uint8 [N, C, F, H, W]."""
    return extract_features(network, samples) if samples.ndim == 4 else summarise(clip_features(network, samples))


def bundled_references() -> list[str]:
    """The names of the references that ship with the package."""
    return sorted([*(f.name for f in REFERENCES.iterdir() if (f / "test.safetensors").is_file()), *RENDERED])


def load_reference(
    name: str, split: Split = "test", device: torch.device | str = "cpu", locator: WeightsLocator | None = None
) -> Reference:
    """A bundled reference by name, or a reference folder. ``locator`` finds the weights of a network that is not in the
    folder. Raises ``UserError`` if something is missing or damaged."""
    if name in RENDERED and not Path(name).is_dir():
        return _rendered(name, split, device)
    folder = _folder(name)
    if not (folder / f"{split}.safetensors").is_file():
        if folder.is_dir():
            raise UserError(
                f"{name} is not a reference: it has no {split}.safetensors. Of real images, fewstep data reference "
                "makes one in a new folder."
            )
        hint = nearest_folder(folder) if "/" in name else nearest(name, bundled_references())
        raise UserError(f"No reference {name!r}{hint}. fewstep data reference makes one from images.")
    config = _config(folder)
    network: ReferenceNetwork
    if config is None or config.network == CLASSIFIER:
        network = ClassifierFeatures.load(folder, device)
    else:
        network = ImageFeatures.load(config.network, config.shape, locator or WeightsLocator.from_environment(), device)
    if config is not None and network.sha256 != config.network_sha256:
        raise UserError(
            f"{folder} contains features of {config.network} with other weights than those found here: create the "
            "reference again with fewstep data reference."
        )
    file = folder / f"{split}.safetensors"
    features, statistics = _features(file, split)
    if features.shape[1] != network.dimension:
        raise UserError(
            f"{folder} contains features of dimension {features.shape[1]}, but its network has {network.dimension}."
        )
    names = config.class_names if config is not None else ()
    return Reference(name, split, network, features, statistics, sha256(file), names)


def _features(file: Path, split: Split) -> tuple[Tensor, Statistics]:
    """The features [N, D] in a file, and their statistics; of training images it may have these only (N = 0)."""
    tensors = read_tensors(file)
    if split == "train" and "features" not in tensors:
        advice = "Create the reference again with fewstep data reference."
        with reading(file, "file of the statistics of training images", advice):
            try:
                mean, covariance = (tensors[name] for name in ("mean", "covariance"))
                if not (mean.is_floating_point() and covariance.is_floating_point()):
                    raise ValueError("mean and covariance must be floating-point numbers")
                statistics = Statistics(mean.double(), covariance.double(), int(tensors["count"]))
            except UserError as error:
                raise ValueError(str(error).removesuffix(".")) from error
        statistics.check_semidefinite(str(file))
        return torch.empty(0, len(mean)), statistics
    features = tensors.get("features", torch.empty(0))
    if features.ndim != 2 or not features.is_floating_point():
        raise UserError(f"{file} contains no features [N, D]; create the reference again with fewstep data reference.")
    return features, Statistics.of(features)


def _rendered(name: str, split: Split, device: torch.device | str) -> Reference:
    """A reference of emoji: renders of its captions in turn, others for each split."""
    source = clip_scores if name in clip_scores.SPLITS else emoji
    network = ClassifierFeatures.load(REFERENCES / source.FOLDER, device)
    captions, real, digest = source.real_set(name, f"reference/{split}")
    features = extract(network, real)
    return Reference(name, split, network, features, Statistics.of(features), digest, captions=captions)


def is_reference(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / "test.safetensors").is_file()


def read_reference(folder: Path) -> ReferenceConfig:
    """The description of a reference folder. Raises ``UserError`` if it is missing or damaged."""
    file = folder / CONFIG
    with reading(file, "description of a reference"):
        return ReferenceConfig.model_validate_json(file.read_bytes())


def _config(folder: Path) -> ReferenceConfig | None:
    """``reference.json``; None in older references, whose network is a classifier."""
    return read_reference(folder) if (folder / CONFIG).is_file() else None


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
