"""Evaluation protocols: what is measured, on how many images, prepared how, against what. One YAML file each."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from torch import Tensor

from fewstep.errors import UserError, nearest
from fewstep.eval.cmmd import cmmd
from fewstep.eval.collected import Collected, collect, holds_statistics, read_statistics, write_statistics
from fewstep.eval.diversity import cross_seed_diversity, in_batch_similarity
from fewstep.eval.features import Features
from fewstep.eval.frechet import bias_note, frechet_distance, frechet_infinity
from fewstep.eval.images import Crop, Filter, Images, ImageSet
from fewstep.eval.inception_score import inception_score
from fewstep.eval.kid import kid
from fewstep.eval.networks.clip import PREFIX, Clip
from fewstep.eval.networks.dinov2 import DinoV2
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.i3d import I3d
from fewstep.eval.networks.inception import Inception, InceptionClasses, Mode
from fewstep.eval.networks.weights import VARIABLE, Place, clean_fids_statistics
from fewstep.eval.precision_recall import density_coverage, precision_recall
from fewstep.eval.references import references
from fewstep.models.hub.encoded import read_prompts

PACKAGES = ("fewstep", "torch", "pillow", "open_clip_torch", "timm")
PROTOCOLS = Path(__file__).parents[1] / "configs" / "eval"


class Scored(NamedTuple):
    """What a metric is given: both sets in its network's features, the captions' embeddings, and how many conditions
    the images show in turn (0: not known)."""

    images: Collected
    reference: Collected | None
    texts: Tensor | None
    conditions: int

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Features of the real images and of these."""
        return self.real.features(), self.images.features()

    @property
    def real(self) -> Collected:
        assert self.reference is not None
        return self.reference

    @property
    def by_seed(self) -> Tensor:
        """Features [S, N, D] of S rounds through N conditions. Raises ``UserError`` on fewer than two rounds."""
        rows = self.images.features()
        rounds = len(rows) // self.conditions if self.conditions else 0
        if rounds < 2:
            raise UserError(f"{len(rows)} images of {self.conditions} conditions: two a condition are needed.")
        return rows[: rounds * self.conditions].reshape(rounds, self.conditions, -1)


class Metric(NamedTuple):
    """``network``: a key of ``NETWORKS``. ``rows``: it needs every image's features; ``reference``: real images."""

    network: str
    of: Callable[[Scored], float]
    rows: bool = False
    reference: bool = True
    prefix: str | None = None  # of captions; None: it needs none


def _frechet(s: Scored) -> float:
    return frechet_distance(s.images.statistics, s.real.statistics)


def _clip_score(s: Scored) -> float:
    assert s.texts is not None
    return float((s.images.features() * s.texts).sum(1).mean())


METRICS: dict[str, Metric] = {
    "fid": Metric("inception", _frechet),
    "fid_infinity": Metric("inception", lambda s: frechet_infinity(s.images.features(), s.real.statistics), rows=True),
    "kid": Metric("inception", lambda s: kid(*s.both), rows=True),
    "precision": Metric("inception", lambda s: precision_recall(*s.both)[0], rows=True),
    "recall": Metric("inception", lambda s: precision_recall(*s.both)[1], rows=True),
    "density": Metric("inception", lambda s: density_coverage(*s.both)[0], rows=True),
    "coverage": Metric("inception", lambda s: density_coverage(*s.both)[1], rows=True),
    "inception_score": Metric(
        "inception_classes", lambda s: inception_score(s.images.features()), rows=True, reference=False
    ),
    "fd_dinov2": Metric("dinov2", _frechet),
    "fd_efficientnet": Metric("efficientnet", _frechet),
    "clip_fid": Metric("clip_fid", _frechet),
    "cmmd": Metric("cmmd", lambda s: cmmd(*s.both), rows=True),
    "clip_score": Metric("clip", _clip_score, rows=True, reference=False, prefix=""),
    "clip_score_dmd2": Metric("clip", _clip_score, rows=True, reference=False, prefix=PREFIX),
    "similarity": Metric("clip", lambda s: in_batch_similarity(s.by_seed), rows=True, reference=False),
    "diversity": Metric("clip", lambda s: cross_seed_diversity(s.by_seed), rows=True, reference=False),
    "fvd": Metric("i3d", _frechet),
}


class Protocol(BaseModel):
    """``reference``: an embedded reference by name (which has metrics of its own), or files of real images or their
    statistics, ``{network}`` standing for each network's name. ``size``: images are cropped to their centred square and
    resized to it with ``filter``. ``frames``: of videos, for FVD. ``captions``: a text file, one a line; image k shows
    caption k, counted round.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    reference: str | None = None
    metrics: tuple[str, ...] = ()
    inception: Mode = "clean"
    clip: str = "ViT-g-14:laion2b_s12b_b42k"
    n: PositiveInt
    seeds: tuple[int, ...] = (0,)
    size: PositiveInt | None = None
    filter: Filter = "lanczos"
    frames: PositiveInt | None = None
    captions: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        if not self.metrics and not self.embedded:
            raise ValueError("metrics are needed, or an embedded reference")
        if self.metrics and self.embedded:
            raise ValueError(f"the embedded reference {self.reference!r} has metrics of its own")
        for name in self.metrics:
            if METRICS[name].reference and self.reference is None:
                raise ValueError(f"{name} needs a reference")
            if METRICS[name].prefix is not None and self.captions is None:
                raise ValueError(f"{name} needs captions")
        return self

    @property
    def embedded(self) -> bool:
        return self.reference in references()

    @property
    def chosen(self) -> list[Metric]:
        return [METRICS[name] for name in self.metrics]

    @property
    def rows(self) -> frozenset[str]:
        """The networks whose features are kept for every image."""
        return frozenset(metric.network for metric in self.chosen if metric.rows)

    @property
    def crop(self) -> Crop | None:
        return Crop(self.size, self.filter) if self.size else None

    def images(self, source: Path, skip_bad: bool = False, most: int | None = None) -> ImageSet:
        """Images on disk, prepared as it wants them."""
        return ImageSet.open(source, self.crop, skip_bad, most, self.frames)


def protocols() -> list[str]:
    return sorted(file.stem for file in PROTOCOLS.glob("*.yaml"))


def load_protocol(name: str, reference: str | None = None, n: int | None = None, seed: int | None = None) -> Protocol:
    """One that ships, by name, or a YAML file; what is given takes the place of its own. Raises ``UserError``."""
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else PROTOCOLS / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"No protocol {name!r}{nearest(name, protocols())}.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        given = {"reference": reference, "n": n, "seeds": None if seed is None else (seed,)}
        changed = {key: value for key, value in given.items() if value is not None}
        return Protocol.model_validate({"name": file.stem, **settings, **changed})
    except (yaml.YAMLError, TypeError) as error:
        raise UserError(f"{file} is no YAML of settings ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: {'.'.join(map(str, first['loc'])) or 'protocol'}: {first['msg'].removeprefix('Value error, ')}."
        ) from error


class Evaluator:
    """A protocol with its networks and its reference at hand.

    Raises ``UserError`` if weights or the reference are missing, or do not belong together.
    """

    def __init__(
        self, protocol: Protocol, place: Place, device: torch.device | str = "cpu", skip_bad: bool = False
    ) -> None:
        self.protocol, self.skip_bad = protocol, skip_bad
        self.networks = networks_of(protocol, place, device)
        self.captions = _captions(protocol.captions) if protocol.captions else []
        prefixes = {metric.prefix for metric in protocol.chosen if metric.prefix is not None}
        clip = self.networks.get("clip")
        self.texts = {prefix: clip.texts(self.captions, prefix) for prefix in prefixes if isinstance(clip, Clip)}
        self.reference = self._reference(place)

    def open(self, source: Path, most: int | None = None) -> ImageSet:
        """Images on disk, prepared as the protocol wants them."""
        return self.protocol.images(source, self.skip_bad, most)

    def score(self, images: Images, conditions: int = 0) -> dict[str, float]:
        """Every metric of images that show ``conditions`` (captions or classes) in turn. Raises ``UserError``."""
        collected = collect(self.networks, images, self.protocol.rows)
        conditions = conditions or len(self.captions)
        values = {}
        for name in self.protocol.metrics:
            metric = METRICS[name]
            known = collected[metric.network]
            texts = None
            if metric.prefix is not None:
                texts = self.texts[metric.prefix]
                texts = texts[torch.arange(known.statistics.count) % len(texts)].cpu()
            values[name] = metric.of(Scored(known, self.reference.get(metric.network), texts, conditions))
        return values

    def manifest(self, values: dict[str, float], count: int) -> dict[str, Any]:
        """What the values of ``count`` images depend on, and notes for their reader."""
        distances = {name: METRICS[name].network for name in values if METRICS[name].of is _frechet}
        notes = [
            bias_note(name, values[name], count, self.reference[network].statistics)
            for name, network in distances.items()
        ]
        return {
            "protocol": self.protocol.model_dump(mode="json"),
            "networks": {network.name: network.sha256 for network in self.networks.values()},
            "reference": {key: known.statistics.count or None for key, known in self.reference.items()},
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "notes": [note for note in notes if note],
        }

    def _reference(self, place: Place) -> dict[str, Collected]:
        """Statistics from files, one a network; what is a set of images instead is read once for all networks."""
        wanted = {metric.network for metric in self.protocol.chosen if metric.reference}
        networks = {key: network for key, network in self.networks.items() if key in wanted}
        found: dict[str, Collected] = {}
        unread: dict[Path, dict[str, Features]] = {}
        for key, network in networks.items():
            file = _located(str(self.protocol.reference).format(network=file_name(network)), place)
            if holds_statistics(file):
                found[key] = read_statistics(file, network)
            else:
                unread.setdefault(file, {})[key] = network
        for file, own in unread.items():
            found |= collect(own, self.open(file), self.protocol.rows & set(own))
        return found


def write_reference(
    source: Path, protocol: Protocol, file: str, place: Place, device: torch.device | str = "cpu",
    skip_bad: bool = False,
) -> list[Path]:  # fmt: skip
    """The statistics of images as the networks that a protocol compares by see them: an .npz for each, its name in the
    place of ``{network}``. Returns the files. Raises ``UserError`` if several would have one name."""
    networks = networks_of(protocol, place, device, compared=True)
    if len(networks) > 1 and "{network}" not in file:
        names = ", ".join(network.name for network in networks.values())
        raise UserError(f"The protocol has several networks ({names}): give a file name with {{network}} in it.")
    files = []
    known = collect(networks, protocol.images(source, skip_bad), protocol.rows & set(networks))
    for key, collected in known.items():
        files.append(Path(file.format(network=file_name(networks[key]))))
        write_statistics(collected, files[-1])
    return files


def networks_of(
    protocol: Protocol, place: Place, device: torch.device | str, compared: bool = False
) -> dict[str, Features]:
    """The networks of a protocol's metrics or, ``compared``, of those that have a reference. Raises ``UserError``."""
    keys = {metric.network for metric in protocol.chosen if metric.reference or not compared}
    return {key: _network(key, protocol, place, device) for key in sorted(keys)}


def file_name(network: Features) -> str:
    """A network's name as part of a file's."""
    return network.name.replace(":", "-").replace("/", "-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _located(name: str, place: Place) -> Path:
    if Path(name).exists():
        return Path(name)
    if found := place.look(Path(name).name, clean_fids_statistics()):
        return found
    raise UserError(
        f"The reference {name} is not there: name real images, or an .npz of their statistics, with --reference, or "
        f"put it into --weights or a folder of ${VARIABLE}."
    )


def _captions(file: str) -> list[str]:
    given = Path(file) if Path(file).is_file() else PROTOCOLS / file
    return read_prompts(given)


def _network(key: str, protocol: Protocol, place: Place, device: torch.device | str) -> Features:
    match key:
        case "inception":
            return Inception.load(protocol.inception, place, device)
        case "inception_classes":
            return InceptionClasses(Inception.load("legacy_tensorflow", place, device))
        case "clip":
            return Clip.load(protocol.clip, place, device)
        case "clip_fid":
            return Clip.load("ViT-B-32:openai", place, device, unit=False)
        case "cmmd":
            return Clip.load("ViT-L-14-336:openai", place, device, squash=True)
        case "dinov2":
            return DinoV2.load(place, device)
        case "efficientnet":
            return EfficientNet.load(device)
    assert key == "i3d"
    return I3d.load(place, device)
