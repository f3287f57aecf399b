"""The features of a set of images: their statistics and, if a metric needs them, the features of every image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_write, reading, sha256
from fewstep.eval.images import Images, ImageSet
from fewstep.eval.metrics.frechet import Moments, Statistics
from fewstep.eval.metrics.jackknife import GROUPS, groups_of
from fewstep.eval.networks.features import FeatureNetwork
from fewstep.eval.saved_features import SavedFeatures

MERGE_ROWS = 1000
SPATIAL = "inception_spatial"  # ADM's files contain its statistics as mu_s and sigma_s
PICKLES = "Pickles are not read."
RECORDED = ("network", "sha256", "images_sha256", "preparation")


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The statistics of a network's features; ``rows`` are the features of every image, float32 [N, D], if kept, and
    ``groups`` the moments of ten random groups of the images (``metrics/jackknife.py``), empty if not kept.

    ``network`` and ``sha256`` name the network and its weights, ``preparation`` says how the images were cropped and
    resized; None if a file does not record them. ``images_sha256`` is the hash of the images, or that of a file which
    does not record it.
    """

    statistics: Statistics
    rows: Tensor | None
    network: str | None
    sha256: str | None
    images_sha256: str | None = None
    preparation: str | None = None
    groups: tuple[Moments, ...] = ()

    def features(self) -> Tensor:
        """The rows. Raises ``UserError`` if there are none."""
        if self.rows is None:
            raise UserError(
                "The reference contains only a mean and a covariance; this metric also needs every image's features."
            )
        return self.rows


def collect_statistics(
    networks: Mapping[str, FeatureNetwork], images: Images, keep_rows: frozenset[str] = frozenset(), *,
    keep_groups: frozenset[str] = frozenset(), strata: int = 1, preparation: str | None = None,
    saved: SavedFeatures | None = None, progress: Callable[[int], None] | None = None,
) -> dict[str, FeatureStatistics]:  # fmt: skip
    """Statistics of the features of several networks in one pass over the images.

    Memory grows with the number of images only for the networks in ``keep_rows``; those in ``keep_groups`` need ten
    times the memory of a covariance (0.3 GB for 2,048 features), for groups of images of ``strata`` conditions in turn.
    ``saved`` keeps the features of a set on disk, so that an interrupted pass can be continued; ``progress`` receives
    the number of finished images. Raises ``UserError`` on fewer than two images, and on images of several sizes if a
    network cannot take them.
    """
    accumulators = {name: _Accumulator(name in keep_rows, strata if name in keep_groups else 0) for name in networks}
    stacks = {name: np.empty(0) for name in networks}  # reused: allocating is slower than the copy

    def prepare(image: Tensor) -> dict[str, Tensor]:
        return {name: network.prepare(image) for name, network in networks.items()}

    if saved is None or not isinstance(images, ImageSet):
        batches = images.batches(prepare)
    else:
        for part in saved.restore():
            for name, accumulator in accumulators.items():
                accumulator.add(part[name])
        batches = images.batches(prepare, resumed=saved.restored)
    done = 0
    for batch in batches:
        features: dict[str, Tensor] = {}
        if batch:
            for name, network in networks.items():
                prepared = [inputs[name].numpy() for inputs in batch]
                if len(shapes := {array.shape for array in prepared}) > 1:
                    raise UserError(
                        f"{network.name} needs images of one size, got {sorted(shapes)}; set size in the protocol."
                    )
                if stacks[name].shape != (len(batch), *prepared[0].shape):
                    stacks[name] = np.empty((len(batch), *prepared[0].shape), prepared[0].dtype)
                features[name] = network(torch.from_numpy(np.stack(prepared, out=stacks[name]))).cpu()
                accumulators[name].add(features[name])
        if saved is not None and isinstance(images, ImageSet):
            saved.add(features, images.done)
        done += len(batch)
        if progress is not None:
            progress(images.scored_count if isinstance(images, ImageSet) else done)
    digest = images.sha256 if isinstance(images, ImageSet) else None
    found = {}
    for name, network in networks.items():
        statistics, rows, groups = accumulators[name].finish()
        found[name] = FeatureStatistics(statistics, rows, network.name, network.sha256, digest, preparation, groups)
    return found


class _Accumulator:
    """Accumulates features, as one group or as those of the jackknife. Batches are concatenated to ``MERGE_ROWS`` rows
    of a group before its [D, D] products are updated."""

    def __init__(self, keep_rows: bool, strata: int) -> None:
        self._keep_rows, self._rows = keep_rows, list[Tensor]()
        self._strata, self._count = strata, 0  # 0: a single group
        self._pending: list[list[Tensor]] = [[] for _ in range(GROUPS if strata else 1)]
        self._moments: dict[int, Moments] = {}

    def add(self, features: Tensor) -> None:
        if self._keep_rows:
            self._rows.append(features.float())
        numbers = torch.arange(self._count, self._count + len(features))
        self._count += len(features)
        groups = groups_of(numbers, self._strata) if self._strata else torch.zeros_like(numbers)
        for group in groups.unique().tolist():
            self._pending[group].append(features[groups == group])
            if sum(map(len, self._pending[group])) >= MERGE_ROWS:
                self._merge(group)

    def finish(self) -> tuple[Statistics, Tensor | None, tuple[Moments, ...]]:
        for group, pending in enumerate(self._pending):
            if pending:
                self._merge(group)
        if not self._moments:
            raise UserError("There are no images to score.")
        first, *others = groups = tuple(self._moments[group] for group in sorted(self._moments))
        rows = torch.cat(self._rows) if self._keep_rows else None
        return sum(others, first).statistics, rows, groups if self._strata else ()

    def _merge(self, group: int) -> None:
        part = Moments.of(torch.cat(self._pending[group]))
        self._moments[group] = self._moments[group] + part if group in self._moments else part
        self._pending[group].clear()


def write_statistics(collected: FeatureStatistics, file: Path) -> None:
    """Writes an .npz file that clean-fid reads too: ``mu``, ``sigma`` and, if rows were kept, ``feats``; and fewstep's
    own ``n``, ``network``, ``sha256``, ``images_sha256`` and ``preparation``."""
    arrays: dict[str, Any] = {
        "mu": collected.statistics.mean.numpy(), "sigma": collected.statistics.covariance.numpy(),
        "n": np.array(collected.statistics.count),
    } | {name: np.array(value) for name in RECORDED if (value := getattr(collected, name)) is not None}  # fmt: skip
    if collected.rows is not None:
        arrays["feats"] = collected.rows.numpy()
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def contains_statistics(file: Path) -> bool:
    """Whether ``file`` is an .npz file of statistics, not of images. Raises ``UserError`` if it cannot be read."""
    if file.suffix != ".npz" or not file.is_file():
        return False
    with reading(file, ".npz file of statistics", PICKLES), np.load(file, allow_pickle=False) as arrays:
        return bool({"mu", "feats"} & set(arrays.files))


def read_statistics(file: Path, network: FeatureNetwork) -> FeatureStatistics:
    """Reads statistics written by fewstep, clean-fid (also those for KID), pytorch-fid, EDM or ADM.

    Raises ``UserError`` if the file is none of these, or if it records another network or other weights.
    """
    known = ("mu", "sigma", "feats", "n", *RECORDED)
    with reading(file, ".npz file of statistics", PICKLES), np.load(file, allow_pickle=False) as arrays:
        of_adm = network.name == SPATIAL and "mu_s" in arrays.files  # mu and sigma are those of the pool features
        stored = {name: f"{name}_s" if of_adm and name in ("mu", "sigma") else name for name in known}
        found = {name: arrays[key] for name, key in stored.items() if key in arrays.files}
    if "feats" not in found and not {"mu", "sigma"} <= set(found):
        raise UserError(f"{file} contains neither mu and sigma nor feats.")
    with reading(file, ".npz file of statistics", PICKLES):
        rows = torch.from_numpy(found["feats"]).float() if "feats" in found else None
        if "mu" in found and "sigma" in found:
            mean, covariance = (torch.from_numpy(found[name]).double() for name in ("mu", "sigma"))
            statistics = Statistics(mean, covariance, int(found["n"]) if "n" in found else 0)
        else:
            assert rows is not None
            statistics = Statistics.of(rows)
        if rows is not None and (rows.ndim != 2 or not rows.isfinite().all()):
            raise ValueError("feats must be finite and of shape [N, D]")
    statistics.check_semidefinite(str(file))
    texts = {name: str(found[name]) if name in found else None for name in RECORDED}
    recorded, digest = texts["network"], texts["sha256"]
    if len(statistics.mean) != network.dimension:
        mismatch = f"{len(statistics.mean)} features, {network.name} has {network.dimension}"
    elif recorded is not None and recorded != network.name:
        mismatch = f"features of {recorded}, not of {network.name}"
    elif digest is not None and digest != network.sha256:
        mismatch = f"features of {recorded} with other weights ({digest[:12]} instead of {network.sha256[:12]})"
    else:
        images = texts["images_sha256"] or sha256(file)
        return FeatureStatistics(statistics, rows, recorded, digest, images, texts["preparation"])
    raise UserError(f"{file} contains {mismatch}; the two cannot be compared.")
