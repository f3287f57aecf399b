"""What a network sees in a set of images: statistics and, where a metric wants them, every image's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import atomic_write
from fewstep.eval.images import Images
from fewstep.eval.metrics.frechet import Moments, Statistics
from fewstep.eval.networks.features import Features

MERGED = 1000


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """``rows`` [N, D] float32, or None where only the statistics were kept; ``network`` and ``sha256`` tell whose
    features they are (None: a file that does not say)."""

    statistics: Statistics
    rows: Tensor | None
    network: str | None
    sha256: str | None

    def features(self) -> Tensor:
        """The rows. Raises ``UserError`` where there are none."""
        if self.rows is None:
            raise UserError("The reference holds a mean and a covariance alone; this metric needs the features, too.")
        return self.rows


def collect(
    networks: Mapping[str, Features], images: Images, rows: frozenset[str] = frozenset()
) -> dict[str, FeatureStatistics]:
    """One pass over images with several networks. Memory grows with their number only for the networks named in
    ``rows``. Raises ``UserError`` on fewer than two images, and on several sizes where a network cannot take them."""
    seen = {name: _Seen(name in rows) for name in networks}
    stacks = {name: np.empty(0) for name in networks}  # used again and again: fresh memory is slower than the copy
    for batch in images.batches(lambda image: {name: network.prepare(image) for name, network in networks.items()}):
        if batch:
            for name, network in networks.items():
                prepared = [one[name].numpy() for one in batch]
                if len(shapes := {one.shape for one in prepared}) > 1:
                    raise UserError(f"{network.name} needs images of one size, got {sorted(shapes)}: set a size.")
                if stacks[name].shape != (len(batch), *prepared[0].shape):
                    stacks[name] = np.empty((len(batch), *prepared[0].shape), prepared[0].dtype)
                seen[name].add(network(torch.from_numpy(np.stack(prepared, out=stacks[name]))).cpu())
    return {
        name: FeatureStatistics(*seen[name].finish(), network.name, network.sha256)
        for name, network in networks.items()
    }


class _Seen:
    """Features so far. A batch is merged with others before the [D, D] products are touched."""

    def __init__(self, keep: bool) -> None:
        self._keep, self._kept = keep, list[Tensor]()
        self._fresh: list[Tensor] = []
        self._moments: Moments | None = None

    def add(self, features: Tensor) -> None:
        self._fresh.append(features)
        if self._keep:
            self._kept.append(features.float())
        if sum(map(len, self._fresh)) >= MERGED:
            self._merge()

    def finish(self) -> tuple[Statistics, Tensor | None]:
        if self._fresh:
            self._merge()
        if self._moments is None:
            raise UserError("There are no images to score.")
        return self._moments.statistics, torch.cat(self._kept) if self._keep else None

    def _merge(self) -> None:
        part = Moments.of(torch.cat(self._fresh))
        self._moments = self._moments + part if self._moments else part
        self._fresh.clear()


def write_statistics(collected: FeatureStatistics, file: Path) -> None:
    """An .npz that clean-fid reads, too: ``mu``, ``sigma`` and, if there are rows, ``feats``; with our ``n``,
    ``network`` and ``sha256``."""
    arrays: dict[str, Any] = {
        "mu": collected.statistics.mean.numpy(), "sigma": collected.statistics.covariance.numpy(),
        "n": np.array(collected.statistics.count), "network": np.array(collected.network),
        "sha256": np.array(collected.sha256),
    }  # fmt: skip
    if collected.rows is not None:
        arrays["feats"] = collected.rows.numpy()
    with atomic_write(file) as aside, aside.open("wb") as stream:
        np.savez(stream, **arrays)


def holds_statistics(file: Path) -> bool:
    """Whether it is an .npz of statistics, not of images."""
    if file.suffix != ".npz" or not file.is_file():
        return False
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return bool({"mu", "feats"} & set(arrays.files))
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{file} holds no statistics as .npz ({error}); pickles are not read.") from error


def read_statistics(file: Path, network: Features) -> FeatureStatistics:
    """Statistics of ours, clean-fid's (also those for KID), pytorch-fid's, EDM's or ADM's.

    Raises ``UserError`` if the file is none, or is of another network than this as far as it tells.
    """
    wanted = ("mu", "sigma", "feats", "n", "network", "sha256")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in wanted if name in arrays.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{file} holds no statistics as .npz ({error}); pickles are not read.") from error
    if "feats" not in found and not {"mu", "sigma"} <= set(found):
        raise UserError(f"{file} has neither mu and sigma nor feats.")
    rows = torch.from_numpy(found["feats"]).float() if "feats" in found else None
    if "mu" in found and "sigma" in found:
        mean, covariance = (torch.from_numpy(found[name]).double() for name in ("mu", "sigma"))
        statistics = Statistics(mean, covariance, int(found["n"]) if "n" in found else 0)
    else:
        assert rows is not None
        statistics = Statistics.of(rows)
    made_by, digest = (str(found[name]) if name in found else None for name in ("network", "sha256"))
    if len(statistics.mean) != network.dimension:
        wrong = f"{len(statistics.mean)} features, {network.name} has {network.dimension}"
    elif made_by is not None and made_by != network.name:
        wrong = f"features of {made_by}, not of {network.name}"
    elif digest is not None and digest != network.sha256:
        wrong = f"features of {made_by} with other weights ({digest[:12]}, here {network.sha256[:12]})"
    else:
        return FeatureStatistics(statistics, rows, made_by, digest)
    raise UserError(f"{file} holds {wrong}: the two cannot be compared.")
