"""Scores by a protocol, of a model (whose images are generated in parts) or of images; and statistics as references."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import (
    FeatureStatistics,
    collect_statistics,
    contains_statistics,
    read_statistics,
    write_statistics,
)
from fewstep.eval.images import Images, InMemoryImages
from fewstep.eval.metrics.metric import MetricInput
from fewstep.eval.networks.clip import Clip
from fewstep.eval.networks.features import FeatureNetwork
from fewstep.eval.networks.registry import build_networks
from fewstep.eval.networks.weights import VARIABLE, WeightsLocator, clean_fid_statistics
from fewstep.eval.protocol import Protocol
from fewstep.eval.score_files import Score, scores_of_generated, scores_of_images
from fewstep.models.loading import Model
from fewstep.samplers.generate import GeneratedSet, Progress
from fewstep.samplers.plan import SamplingConfig

PACKAGES = ("fewstep", "torch", "pillow", "open_clip_torch", "timm")


class ProtocolEvaluator:
    """Scores by a protocol, with the same interface as ``ReferenceEvaluator``; holds its networks and reference.

    Raises ``UserError`` if weights or the reference are missing, or do not belong together.
    """

    def __init__(
        self, protocol: Protocol, locator: WeightsLocator, device: torch.device | str = "cpu", skip_bad: bool = False
    ) -> None:
        self.protocol, self.seeds, self._metrics = protocol, protocol.seeds, protocol.resolved_metrics
        self._skip_bad, self._captions = skip_bad, protocol.read_captions()
        if skip_bad and self._captions:
            raise UserError(
                "--skip-bad would shift the captions of the images after a bad one; remove it and its caption instead."
            )
        names = {metric.network for metric in self._metrics.values()}
        self._networks = build_networks(names, protocol, locator, device)
        self.hashes = {network.sha256 for network in self._networks.values()}
        prefixes = {metric.caption_prefix for metric in self._metrics.values() if metric.caption_prefix is not None}
        clip = self._networks.get("clip")
        self._texts = {p: clip.embed_texts(self._captions, p) for p in prefixes if isinstance(clip, Clip)}
        self._reference = self._read_reference(locator)

    def check(self, model: Model) -> None:
        """Raises ``UserError`` if the protocol does not fit the model, before any image is generated."""
        if model.config.classes and self._captions:
            raise UserError(f"The protocol {self.protocol.name!r} has captions; this model takes class labels.")
        if not model.config.classes and not self._captions:
            raise UserError(f"The protocol {self.protocol.name!r} has no captions, which this model needs.")
        if (len(model.config.shape) == 4) != bool(self.protocol.frames):
            scored, generated = ("videos", "images") if self.protocol.frames else ("images", "videos")
            raise UserError(f"The protocol {self.protocol.name!r} scores {scored}; this model generates {generated}.")
        self._check_count(self.protocol.n, model.config.classes or len(self._captions))

    def __call__(
        self, model: Model, name: str, sampling: SamplingConfig, progress: Progress | None = None
    ) -> list[Score]:
        """Generates image k for class or caption k modulo their number, and returns one score per metric."""
        generated = GeneratedSet(model, sampling, self.protocol.n, self._captions, progress=progress)
        images = InMemoryImages(generated.parts(), self.protocol.crop)
        values = self.values(images, model.config.classes)
        return scores_of_generated(generated, values, model=name, **self._fields(values, self.protocol.n))

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Scores of images on disk, of at most as many as the protocol requires."""
        images = self.protocol.open_images(source, self._skip_bad, limit=self.protocol.n)
        self._check_count(len(images.names), len(self._captions))
        values = self.values(images)
        return scores_of_images(images, values, model=name, **self._fields(values, images.scored_count))

    def values(self, images: Images, conditions: int = 0) -> dict[str, float]:
        """The value of every metric. The images show ``conditions`` classes in turn, or (0) the captions. Raises
        ``UserError``."""
        inputs = {
            key: MetricInput(statistics, self._reference.get(key), self._texts, conditions or len(self._captions))
            for key, statistics in collect_statistics(self._networks, images, _keep_rows(self.protocol)).items()
        }
        return {name: metric.compute(inputs[metric.network]) for name, metric in self._metrics.items()}

    def _check_count(self, n: int, conditions: int) -> None:
        for metric in self._metrics.values():
            metric.check_count(n, conditions)

    def _fields(self, values: dict[str, float], count: int) -> dict[str, Any]:
        """The fields of the scores of ``count`` images: what their values depend on, with notes for readers."""
        notes = [
            metric.note(name, values[name], count, self._reference[metric.network].statistics)
            for name, metric in self._metrics.items() if metric.note is not None
        ]  # fmt: skip
        manifest = {
            "protocol": self.protocol.model_dump(mode="json"),
            "networks": {network.name: network.sha256 for network in self._networks.values()},
            "reference": {key: known.statistics.count or None for key, known in self._reference.items()},
            "directions": {name: metric.direction for name, metric in self._metrics.items()},
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "notes": [note for note in notes if note],
        }
        return {
            "n": count, "reference": self.protocol.reference or "", "protocol": self.protocol.name,
            "sha256": {name: self._networks[metric.network].sha256 for name, metric in self._metrics.items()},
            "manifest": manifest,
        }  # fmt: skip

    def _read_reference(self, locator: WeightsLocator) -> dict[str, FeatureStatistics]:
        """The reference of each network: statistics from its file; or from images, in one pass for all networks."""
        found: dict[str, FeatureStatistics] = {}
        image_sets: dict[Path, dict[str, FeatureNetwork]] = {}
        for key in {metric.network for metric in self._metrics.values() if metric.needs_reference}:
            network = self._networks[key]
            file = _find_reference(_insert_network(str(self.protocol.reference), network), locator)
            if contains_statistics(file):
                found[key] = read_statistics(file, network)
            else:
                image_sets.setdefault(file, {})[key] = network
        for file, networks in image_sets.items():
            images = self.protocol.open_images(file, self._skip_bad)
            found |= collect_statistics(networks, images, _keep_rows(self.protocol))
        return found


def write_reference(
    source: Path, protocol: Protocol, file: str, locator: WeightsLocator, device: torch.device | str = "cpu",
    skip_bad: bool = False,
) -> list[Path]:  # fmt: skip
    """Writes the statistics of images as an .npz file for each network whose metrics need a reference.

    ``{network}`` in ``file`` is replaced by the network's name. Returns the files. Raises ``UserError`` if several
    networks would write the same file.
    """
    names = {metric.network for metric in protocol.resolved_metrics.values() if metric.needs_reference}
    networks = build_networks(names, protocol, locator, device)
    if not networks:
        raise UserError(f"No metric of the protocol {protocol.name!r} compares with statistics, so none are written.")
    if len(networks) > 1 and "{network}" not in file:
        listed = ", ".join(network.name for network in networks.values())
        raise UserError(f"The protocol has several networks ({listed}); give a file name that contains {{network}}.")
    files = []
    collected = collect_statistics(networks, protocol.open_images(source, skip_bad), _keep_rows(protocol))
    for key, statistics in collected.items():
        files.append(Path(_insert_network(file, networks[key])))
        write_statistics(statistics, files[-1])
    return files


def _keep_rows(protocol: Protocol) -> frozenset[str]:
    """The networks whose metrics need the features of every image."""
    return frozenset(metric.network for metric in protocol.resolved_metrics.values() if metric.needs_features)


def _insert_network(file: str, network: FeatureNetwork) -> str:
    return file.replace("{network}", network.name.replace(":", "-").replace("/", "-"))


def _find_reference(name: str, locator: WeightsLocator) -> Path:
    if Path(name).exists():
        return Path(name)
    if found := locator.find_local(Path(name).name, clean_fid_statistics()):
        return found
    raise UserError(
        f"The reference {name} was not found: give real images, or an .npz file of their statistics, with --reference, "
        f"or put it into --weights or a folder of ${VARIABLE}."
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
