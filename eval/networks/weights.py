"""Finding the weights of metric networks: in a path of the user's, a folder of the environment, or a library's cache.

Nothing is downloaded unless the user allows it, and no other file is used as a substitute.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fewstep.core.errors import UserError
from fewstep.core.files import sha256

VARIABLE = "FEWSTEP_WEIGHTS"


@dataclass(frozen=True)
class LoadedWeights:
    """A network with the weights of a file; ``sha256`` is the hash of that file."""

    sha256: str
    network: Any
    device: torch.device

    @classmethod
    def from_file(cls, file: Path, network: Any, device: torch.device | str, **fields: Any) -> Self:
        """``network``, which already has the weights of ``file``, in eval mode on ``device``."""
        return cls(sha256(file), network.eval().to(device), torch.device(device), **fields)


@contextmanager
def reading_weights(file: Path, network: str) -> Iterator[None]:
    """Raises ``UserError`` if ``file`` turns out not to contain the weights of ``network``."""
    try:
        yield
    except Exception as error:  # on damaged or other files, torch and pickle raise exceptions of almost every type
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{file} does not contain the weights of {network} ({reason}).") from error


@dataclass(frozen=True)
class WeightsLocator:
    """Finds files in ``paths`` (files or folders), then in caches; ``download`` allows downloading missing ones."""

    paths: tuple[Path, ...] = ()
    download: bool = False

    @staticmethod
    def from_environment(path: Path | None = None, download: bool = False) -> WeightsLocator:
        """Searches ``path``, then the folders of the environment variable ``FEWSTEP_WEIGHTS``. Raises ``UserError`` if
        ``path`` does not exist."""
        folders = tuple(Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part)
        if path is None:
            return WeightsLocator(folders, download)
        if not path.exists():
            raise UserError(f"--weights {path}: no such file or folder.")
        return WeightsLocator((path, *folders), download)

    def find_local(self, file: str, caches: Sequence[Path] = ()) -> Path | None:
        """The file of that name, or None."""
        for path in (*self.paths, *caches):
            if path.name == file and path.is_file():
                return path
            if (path / file).is_file():
                return path / file
        return None

    def find(self, file: str, url: str, caches: Sequence[Path] = ()) -> Path:
        """The file of that name, downloaded from ``url`` if that is allowed. Raises ``UserError`` with instructions if
        it is missing."""
        if found := self.find_local(file, caches):
            return found
        if self.download:
            return _download(url, (caches or [hub_cache()])[0] / file)
        cache = caches[0] if caches else hub_cache()
        raise UserError(
            f"The weights {file} were not found. Download {url} and put it into {cache}, or into a folder given by "
            f"--weights or ${VARIABLE}. fewstep eval --protocol downloads it, if --download allows that."
        )


def hub_cache() -> Path:
    """Torch hub's folder of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def temporary_folder() -> Path:
    """Where clean-fid keeps its network."""
    return Path(tempfile.gettempdir())


def clean_fid_statistics() -> list[Path]:
    """Clean-fid's folders of statistics of real images; empty if it is not installed."""
    spec = importlib.util.find_spec("cleanfid")
    return [Path(folder) / "stats" for folder in (spec.submodule_search_locations or [])] if spec else []


def _download(url: str, file: Path) -> Path:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    except OSError as error:
        raise UserError(f"{url} cannot be downloaded ({error}). Get it elsewhere and copy it to {file}.") from error
    return file
