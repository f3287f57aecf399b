"""Features of a set of images on disk while they are computed, so that an interrupted evaluation can be continued."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors, write_text
from fewstep.core.json_files import read_json_object
from fewstep.eval.images import ImageSet, Pass
from fewstep.eval.networks.features import FeatureNetwork

PART_IMAGES = 500


@dataclass
class SavedFeatures:
    """Parts of ``PART_IMAGES`` images in ``folder``: features by network, and the pass that computed them.

    They are reused only for the same networks and weights, names, sizes and times of the files, and preparation.
    """

    folder: Path
    key: str
    restored: Pass = field(default_factory=Pass)
    _parts: int = 0
    _pending: dict[str, list[Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(folder: Path, images: ImageSet, networks: Mapping[str, FeatureNetwork]) -> SavedFeatures:
        """The parts of this set in ``folder``; those of another set are deleted."""
        source = images.source
        files = [source / name for name in images.names] if source.is_dir() else [source]
        stats = [(file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in files]
        facts = [
            images.names, stats, str(images.crop), images.frames, images.count, images.skip_bad,
            {name: (network.name, network.sha256) for name, network in networks.items()},
        ]  # fmt: skip
        return SavedFeatures(folder, hashlib.sha256(json.dumps(facts).encode()).hexdigest())

    def restore(self) -> Iterator[dict[str, Tensor]]:
        """The features of the finished parts, in order; sets ``restored`` to the pass after the last of them."""
        state = self._read_state()
        if state is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for part in range(state["parts"]):
            yield read_tensors(self._file(part))
        self._parts = state["parts"]
        digests = [bytes.fromhex(digest) for digest in state["pass"]["digests"]]
        self.restored = Pass(**{**state["pass"], "digests": digests})

    def add(self, features: Mapping[str, Tensor], done: Pass) -> None:
        """Adds the features of a batch, after which the pass is ``done``; writes a part if enough are pending."""
        for name, values in features.items():
            self._pending.setdefault(name, []).append(values.float())
        if sum(map(len, next(iter(self._pending.values()), []))) < PART_IMAGES:
            return
        write_tensors({name: torch.cat(parts) for name, parts in self._pending.items()}, self._file(self._parts))
        self._pending.clear()
        self._parts += 1
        record = asdict(done) | {"digests": [digest.hex() for digest in done.digests]}
        write_text(json.dumps({"key": self.key, "parts": self._parts, "pass": record}), self.folder / "state.json")

    def remove(self) -> None:
        """Deletes the parts, once the scores are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def _read_state(self) -> dict[str, Any] | None:
        """The state, if it belongs to this set and all its parts are readable."""
        try:
            state = read_json_object(self.folder / "state.json")
            if state["key"] != self.key:
                return None
            for part in range(state["parts"]):
                read_tensors(self._file(part))
        except (KeyError, TypeError, UserError):
            return None
        return state
