"""Where the weights of metric networks are: named by the user, in a folder of the environment, or in a library's cache.

Nothing is downloaded unless that is asked for, and nothing else is taken in a file's place.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch

from fewstep.core.errors import UserError
from fewstep.core.files import sha256

VARIABLE = "FEWSTEP_WEIGHTS"


@dataclass(frozen=True)
class LoadedWeights:
    """A network with the weights of a file, whose hash ``sha256`` is."""

    sha256: str
    network: Any
    device: torch.device

    @classmethod
    def of(cls, file: Path, network: Any, device: torch.device | str, **own: Any) -> Self:
        return cls(sha256(file), network.eval().to(device), torch.device(device), **own)


@contextmanager
def reading(file: Path, what: str) -> Iterator[None]:
    """Raises ``UserError`` where a file of weights turns out to hold something else."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{file} holds no weights of {what} ({reason}).") from error


@dataclass(frozen=True)
class WeightsLocator:
    """Where to look before the caches: ``given``, a file or folders; ``download`` allows fetching what is nowhere."""

    given: tuple[Path, ...] = ()
    download: bool = False

    @staticmethod
    def of(given: Path | None = None, download: bool = False) -> WeightsLocator:
        """``given`` and the folders of the environment variable ``FEWSTEP_WEIGHTS``."""
        folders = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
        if given is not None and not given.exists():
            raise UserError(f"--weights {given}: there is no such file or folder.")
        return WeightsLocator(tuple([given] if given else []) + tuple(folders), download)

    def look(self, file: str, caches: Sequence[Path] = ()) -> Path | None:
        """The file of that name, if it is anywhere."""
        for place in (*self.given, *caches):
            if place.name == file and place.is_file():
                return place
            if (place / file).is_file():
                return place / file
        return None

    def find(self, file: str, url: str, caches: Sequence[Path] = ()) -> Path:
        """The same, fetched if that is allowed. Raises ``UserError`` that says what to place where."""
        if found := self.look(file, caches):
            return found
        if self.download:
            return _download(url, (caches or [hub_cache()])[0] / file)
        where = caches[0] if caches else hub_cache()
        raise UserError(
            f"The weights {file} are not there. Fetch {url} and put it into {where}, a folder named by --weights or "
            f"${VARIABLE}, or allow fetching it with --download."
        )


def hub_cache() -> Path:
    """Where torch hub keeps weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def temporary() -> Path:
    """Where clean-fid keeps its network."""
    return Path(tempfile.gettempdir())


def clean_fids_statistics() -> list[Path]:
    """Where clean-fid keeps statistics of real images, if it is installed."""
    spec = importlib.util.find_spec("cleanfid")
    return [Path(folder) / "stats" for folder in (spec.submodule_search_locations or [])] if spec else []


def _download(url: str, file: Path) -> Path:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    except OSError as error:
        raise UserError(f"{url} cannot be fetched ({error}). Fetch it elsewhere and put it at {file}.") from error
    return file
