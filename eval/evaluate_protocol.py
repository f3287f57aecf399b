"""Scores by a protocol, of a model (whose images are generated in parts) or of images; and statistics as references."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import check_writable
from fewstep.eval.feature_statistics import (
    FeatureStatistics,
    collect_statistics,
    contains_statistics,
    read_statistics,
    write_statistics,
)
from fewstep.eval.images import Images, InMemoryImages
from fewstep.eval.metrics.jackknife import strata
from fewstep.eval.metrics.metric import Measurement, MetricInput
from fewstep.eval.networks.clip import Clip
from fewstep.eval.networks.features import FeatureNetwork
from fewstep.eval.networks.registry import build_networks
from fewstep.eval.networks.weights import VARIABLE, WeightsLocator, clean_fid_statistics
from fewstep.eval.protocol import Protocol
from fewstep.eval.saved_features import SavedFeatures
from fewstep.eval.score_files import Score, scores_of_generated, scores_of_images
from fewstep.models.loading import Model
from fewstep.samplers.generate import GeneratedSet, Progress
from fewstep.samplers.plan import SamplingConfig

PACKAGES = ("fewstep", "torch", "pillow", "open_clip_torch", "timm")


class ProtocolEvaluator:
    """Scores by a protocol, with the same interface as ``ReferenceEvaluator``; holds its networks and reference.

    ``progress(what, done)`` counts images that were read; ``work`` is a folder for the features of unfinished sets, so
    that an interrupted evaluation of images can be continued. Raises ``UserError`` if weights or the reference are
    missing, or do not belong together.
    """

    def __init__(
        self, protocol: Protocol, locator: WeightsLocator, device: torch.device | str = "cpu", skip_bad: bool = False,
        *, work: Path | None = None, progress: Callable[[str, int], None] | None = None,
    ) -> None:  # fmt: skip
        self.protocol, self.seeds, self._metrics = protocol, protocol.seeds, protocol.resolved_metrics
        self._skip_bad, self._work, self._progress = skip_bad, work, progress
        self._captions, self._notes = protocol.read_captions(), list[str]()
        self._pairs = any(metric.needs_captions for metric in self._metrics.values())
        if skip_bad and self._captions and self._pairs:
            raise UserError(
                "--skip-bad would shift the captions of the images after a bad one; remove it and its caption instead."
            )
        names = {metric.network for metric in self._metrics.values()}
        self._networks = build_networks(names, protocol, locator, device)
        self.hashes = {network.sha256 for network in self._networks.values()}
        self._embedded: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._reference = self._read_reference(locator)

    def check(self, model: Model) -> None:
        """Raises ``UserError`` if the protocol does not fit the model, before any image is generated."""
        if not model.config.takes_prompts and self._captions:
            takes = "is unconditional" if model.config.unconditional else "takes class labels"
            raise UserError(f"The protocol {self.protocol.name!r} has captions; this model {takes}.")
        if model.config.takes_prompts and not self._captions:
            raise UserError(f"The protocol {self.protocol.name!r} has no captions, which this model needs.")
        if (len(model.config.shape) == 4) != bool(self.protocol.frames):
            scored, generated = ("videos", "images") if self.protocol.frames else ("images", "videos")
            raise UserError(f"The protocol {self.protocol.name!r} scores {scored}; this model generates {generated}.")
        self._check_count(self.protocol.n, model.config.classes or max(1, len(self._texts)))

    def __call__(
        self, model: Model, name: str, sampling: SamplingConfig, progress: Progress | None = None
    ) -> list[Score]:
        """Generates image k for class or caption k modulo their number, and returns one score per metric."""
        generated = GeneratedSet(model, sampling, self.protocol.n, self._texts, progress=progress)
        images = InMemoryImages(generated.parts(), self.protocol.crop)
        measured = self.measure(images, self._texts, model.config.classes or max(1, len(self._texts)))
        captions = dict.fromkeys(measured, self._captions.sha256 if self._captions else None)
        return scores_of_generated(generated, measured, self._hashes(captions), model=name, **self._fields())

    def of_images(self, source: Path, name: str) -> list[Score]:
        """Scores of exactly as many images on disk as the protocol requires."""
        self._check_count(self.protocol.n, self._captions.conditions if self._captions else 0)
        images = self.protocol.open_images(source, self._skip_bad, self.protocol.n)
        texts: tuple[str, ...] = ()
        captions: dict[str, str | None] = dict.fromkeys(self._metrics)
        if self._captions and self._pairs:
            images.names, texts = self._captions.pair(images.names)
            captions |= {key: self._captions.sha256 for key, metric in self._metrics.items() if metric.needs_captions}
            self._check_count(self.protocol.n, len(texts))  # those of a table are paired with images
        saved = SavedFeatures.of(self._work / "images", images, self._networks) if self._work else None
        measured = self.measure(images, texts, len(texts), saved)
        return scores_of_images(images, measured, self._hashes(captions), model=name, **self._fields())

    def measure(
        self, images: Images, texts: tuple[str, ...] = (), conditions: int = 0, saved: SavedFeatures | None = None
    ) -> dict[str, Measurement]:
        """The value of every metric. Image k shows text or class ``k % conditions``. Raises ``UserError``."""
        groups = frozenset(metric.network for metric in self._metrics.values() if metric.needs_groups)
        collected = collect_statistics(
            self._networks, images, _keep_rows(self.protocol), keep_groups=groups,
            strata=strata(self.protocol.n, conditions), saved=saved, progress=self._counting("images"),
        )  # fmt: skip
        embedded = self._embed(texts)
        inputs = {
            key: MetricInput(statistics, self._reference.get(key), embedded, conditions)
            for key, statistics in collected.items()
        }
        return {name: metric.measure(inputs[metric.network]) for name, metric in self._metrics.items()}

    @property
    def _texts(self) -> tuple[str, ...]:
        return self._captions.texts if self._captions else ()

    def _embed(self, texts: tuple[str, ...]) -> dict[str, Tensor]:
        """The embeddings of captions by the prefix before them, for the metrics that compare with captions."""
        clip = self._networks.get("clip")
        if texts not in self._embedded and isinstance(clip, Clip):
            prefixes = {metric.caption_prefix for metric in self._metrics.values() if metric.caption_prefix is not None}
            self._embedded[texts] = {prefix: clip.embed_texts(texts, prefix) for prefix in prefixes}
        return self._embedded.get(texts, {})

    def _counting(self, what: str) -> Callable[[int], None] | None:
        return partial(self._progress, what) if self._progress is not None else None

    def _check_count(self, n: int, conditions: int) -> None:
        for metric in self._metrics.values():
            metric.check_count(n, conditions)

    def _hashes(self, captions: Mapping[str, str | None]) -> dict[str, dict[str, str | None]]:
        """The hashes of what each metric's value depends on, by the fields of a score."""
        return {
            name: {
                "features_sha256": self._networks[metric.network].sha256,
                "reference_sha256": self._reference[metric.network].images_sha256 if metric.needs_reference else None,
                "captions_sha256": captions[name],
                "protocol_sha256": self.protocol.sha256,
            }
            for name, metric in self._metrics.items()
        }

    def _fields(self) -> dict[str, Any]:
        """The fields that all scores share, with the manifest."""
        captions = self._captions
        manifest = {
            "protocol": self.protocol.model_dump(mode="json"),
            "preparation": self.protocol.preparation,
            "networks": {network.name: network.sha256 for network in self._networks.values()},
            "features": {name: self._networks[metric.network].name for name, metric in self._metrics.items()},
            "reference": {key: known.statistics.count or None for key, known in self._reference.items()},
            "reference_sha256": {key: known.images_sha256 for key, known in self._reference.items()},
            "captions": {"count": len(captions.texts), "sha256": captions.sha256} if captions else None,
            "directions": {name: metric.direction for name, metric in self._metrics.items()},
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "notes": self._notes,
        }
        return {
            "n": self.protocol.n, "reference": self.protocol.reference or "", "protocol": self.protocol.name,
            "manifest": manifest,
        }  # fmt: skip

    def _needing_real_features(self, network: str) -> str | None:
        """The first metric of a network that needs the features of every real image."""
        metrics = (metric for metric in self._metrics.values() if metric.network == network)
        return next((metric.name for metric in metrics if metric.needs_real_features), None)

    def _read_reference(self, locator: WeightsLocator) -> dict[str, FeatureStatistics]:
        """The reference of each network: statistics from its file; or from images, in one pass for all networks."""
        found: dict[str, FeatureStatistics] = {}
        image_sets: dict[Path, dict[str, FeatureNetwork]] = {}
        for key in {metric.network for metric in self._metrics.values() if metric.needs_reference}:
            network = self._networks[key]
            file = _find_reference(_insert_network(str(self.protocol.reference), network), locator)
            if contains_statistics(file):
                found[key] = read_statistics(file, network)
                if found[key].rows is None and (wanting := self._needing_real_features(key)):
                    raise UserError(
                        f"{file} contains only a mean and a covariance; {wanting} needs the features of every "
                        "real image: give the images as the reference, or a file that --write-stats wrote for it."
                    )
                if found[key].preparation not in (None, self.protocol.preparation):
                    raise UserError(
                        f"{file} holds statistics of images prepared as {found[key].preparation!r}, but the protocol "
                        f"{self.protocol.name!r} prepares them as {self.protocol.preparation!r}; change its size and "
                        "filter, or write the statistics with it (--write-stats)."
                    )
            else:
                image_sets.setdefault(file, {})[key] = network
        for file, networks in image_sets.items():
            images = self.protocol.open_images(file, self._skip_bad)
            saved = SavedFeatures.of(self._work / "reference", images, networks) if self._work else None
            found |= collect_statistics(
                networks, images, _keep_rows(self.protocol), preparation=self.protocol.preparation, saved=saved,
                progress=self._counting("reference images"),
            )  # fmt: skip
            self._notes += [f"Reference {remark}" for remark in images.remarks()]
        return found


def write_reference(
    source: Path, protocol: Protocol, file: str, locator: WeightsLocator, device: torch.device | str = "cpu",
    skip_bad: bool = False, progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Writes the statistics of images as an .npz file for each network whose metrics need a reference.

    ``{network}`` in ``file`` is replaced by the network's name. Returns the files, and remarks on images that were left
    out. Raises ``UserError`` if several networks would write the same file, or if a file is the source.
    """
    names = {metric.network for metric in protocol.resolved_metrics.values() if metric.needs_reference}
    networks = build_networks(names, protocol, locator, device)
    if not networks:
        raise UserError(f"No metric of the protocol {protocol.name!r} compares with statistics, so none are written.")
    if len(networks) > 1 and "{network}" not in file:
        listed = ", ".join(network.name for network in networks.values())
        raise UserError(f"The protocol has several networks ({listed}); give a file name that contains {{network}}.")
    files = {key: Path(_insert_network(file, network)) for key, network in networks.items()}
    for each in files.values():
        check_writable(each, source)
    images = protocol.open_images(source, skip_bad)
    count = (lambda done: progress(done, len(images.names))) if progress is not None else None
    collected = collect_statistics(
        networks, images, _keep_rows(protocol), preparation=protocol.preparation, progress=count
    )
    for key, statistics in collected.items():
        write_statistics(statistics, files[key])
    return list(files.values()), images.remarks()


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
