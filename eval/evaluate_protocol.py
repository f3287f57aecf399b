"""Scores by a protocol: of a model, drawn a part at a time, or of images; and references for protocols."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import (
    FeatureStatistics,
    collect,
    holds_statistics,
    read_statistics,
    write_statistics,
)
from fewstep.eval.images import Images, InMemoryImages
from fewstep.eval.metrics.frechet import bias_note
from fewstep.eval.metrics.registry import METRICS, MetricInput, frechet
from fewstep.eval.networks.clip import Clip
from fewstep.eval.networks.features import Features
from fewstep.eval.networks.registry import build_networks
from fewstep.eval.networks.weights import VARIABLE, WeightsLocator, clean_fids_statistics
from fewstep.eval.protocol import Protocol
from fewstep.eval.score_files import Score, scores_of_generated, scores_of_images
from fewstep.models.loading import Model
from fewstep.samplers.generate import GeneratedSet, Progress
from fewstep.samplers.plan import SamplingConfig

PACKAGES = ("fewstep", "torch", "pillow", "open_clip_torch", "timm")


class ProtocolEvaluator:
    """Scores by a protocol, as ``ReferenceEvaluator`` by an embedded reference, with its networks and reference at hand.

    Raises ``UserError`` if weights or the reference are missing, or do not belong together.
    """

    def __init__(
        self, protocol: Protocol, place: WeightsLocator, device: torch.device | str = "cpu", skip_bad: bool = False
    ) -> None:
        self.protocol, self.seeds = protocol, protocol.seeds
        self._skip_bad, self._captions = skip_bad, protocol.read_captions()
        if skip_bad and self._captions:
            raise UserError("--skip-bad would give captions to the wrong images: take a bad image and its caption out.")
        self._networks = build_networks(protocol, place, device)
        self.hashes = {network.sha256 for network in self._networks.values()}
        prefixes = {metric.prefix for metric in protocol.chosen if metric.prefix is not None}
        clip = self._networks.get("clip")
        self._texts = {prefix: clip.texts(self._captions, prefix) for prefix in prefixes if isinstance(clip, Clip)}
        self._reference = self._read_reference(place)

    def check(self, model: Model) -> None:
        """Raises ``UserError`` on a model that cannot be asked for what the protocol asks for."""
        if model.config.classes and self._captions:
            raise UserError(f"The protocol {self.protocol.name!r} has captions; this model takes class labels.")
        if not model.config.classes and not self._captions:
            raise UserError(f"The protocol {self.protocol.name!r} has no captions, which this model needs.")
        if (len(model.config.shape) == 4) != bool(self.protocol.frames):
            seen, drawn = ("videos", "images") if self.protocol.frames else ("images", "videos")
            raise UserError(f"The protocol {self.protocol.name!r} looks at {seen}; this model draws {drawn}.")

    def __call__(
        self, model: Model, name: str, sampling: SamplingConfig, progress: Progress | None = None
    ) -> list[Score]:
        """Draws image k for class or caption k, counted round, and returns one score a metric."""
        generated = GeneratedSet(model, sampling, self.protocol.n, self._captions, progress=progress)
        drawn = InMemoryImages(generated.parts(), self.protocol.crop)
        values = self.values(drawn, model.config.classes)
        return scores_of_generated(generated, values, model=name, **self._about(values, self.protocol.n))

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Of images on disk, all or the protocol's number if there are more."""
        images = self.protocol.images(source, self._skip_bad, most=self.protocol.n)
        values = self.values(images)
        return scores_of_images(images, values, model=name, **self._about(values, images.read_count))

    def values(self, images: Images, conditions: int = 0) -> dict[str, float]:
        """Every metric of images that show ``conditions`` (the captions or, given, classes) in turn. Raises
        ``UserError``."""
        scored = {
            key: MetricInput(known, self._reference.get(key), self._texts, conditions or len(self._captions))
            for key, known in collect(self._networks, images, self.protocol.rows).items()
        }
        return {name: METRICS[name].of(scored[METRICS[name].network]) for name in self.protocol.metrics}

    def _about(self, values: dict[str, float], count: int) -> dict[str, Any]:
        """What the values of ``count`` images depend on, with notes for their reader."""
        distances = {name: METRICS[name].network for name in values if METRICS[name].of is frechet}
        notes = [
            bias_note(name, values[name], count, self._reference[network].statistics)
            for name, network in distances.items()
        ]
        manifest = {
            "protocol": self.protocol.model_dump(mode="json"),
            "networks": {network.name: network.sha256 for network in self._networks.values()},
            "reference": {key: known.statistics.count or None for key, known in self._reference.items()},
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "notes": [note for note in notes if note],
        }
        return {
            "n": count, "reference": self.protocol.reference or "", "protocol": self.protocol.name,
            "sha256": {name: self._networks[METRICS[name].network].sha256 for name in values}, "manifest": manifest,
        }  # fmt: skip

    def _read_reference(self, place: WeightsLocator) -> dict[str, FeatureStatistics]:
        """Statistics from files, one a network; what is a set of images instead is read once for all networks."""
        wanted = {metric.network for metric in self.protocol.chosen if metric.reference}
        found: dict[str, FeatureStatistics] = {}
        unread: dict[Path, dict[str, Features]] = {}
        for key in wanted:
            network = self._networks[key]
            file = _located(_named(str(self.protocol.reference), network), place)
            if holds_statistics(file):
                found[key] = read_statistics(file, network)
            else:
                unread.setdefault(file, {})[key] = network
        for file, own in unread.items():
            found |= collect(own, self.protocol.images(file, self._skip_bad), self.protocol.rows & set(own))
        return found


def write_reference(
    source: Path, protocol: Protocol, file: str, place: WeightsLocator, device: torch.device | str = "cpu",
    skip_bad: bool = False,
) -> list[Path]:  # fmt: skip
    """The statistics of images as the networks that a protocol compares by see them: an .npz for each, its name in the
    place of ``{network}``. Returns the files. Raises ``UserError`` if several would have one name."""
    networks = build_networks(protocol, place, device, compared=True)
    if not networks:
        raise UserError(f"No metric of the protocol {protocol.name!r} compares with statistics, so none are written.")
    if len(networks) > 1 and "{network}" not in file:
        names = ", ".join(network.name for network in networks.values())
        raise UserError(f"The protocol has several networks ({names}): give a file name with {{network}} in it.")
    files = []
    known = collect(networks, protocol.images(source, skip_bad), protocol.rows & set(networks))
    for key, collected in known.items():
        files.append(Path(_named(file, networks[key])))
        write_statistics(collected, files[-1])
    return files


def _named(file: str, network: Features) -> str:
    return file.replace("{network}", network.name.replace(":", "-").replace("/", "-"))


def _located(name: str, place: WeightsLocator) -> Path:
    if Path(name).exists():
        return Path(name)
    if found := place.look(Path(name).name, clean_fids_statistics()):
        return found
    raise UserError(
        f"The reference {name} is not there: name real images, or an .npz of their statistics, with --reference, or "
        f"put it into --weights or a folder of ${VARIABLE}."
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
