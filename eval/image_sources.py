"""The files of a set of images: in a folder, a zip or tar archive, or an .npz file of one array."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fewstep.core.errors import UserError
from fewstep.core.files import reading
from fewstep.core.image_files import IMAGE_SUFFIXES

MAX_BYTES = 1 << 30  # of one image file in an archive
ARCHIVES = (".zip", ".tar", ".npz")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar", ".gz")
MODEL_FILES = ("config.yaml", "config.json", "model_index.json", "state.json")


class Listing(NamedTuple):
    """The names of images in natural order, a function that loads one, and why each other file is left out."""

    names: list[str]
    load: Callable[[str], bytes | np.ndarray]
    left_out: dict[str, str]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers in names by value: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


def is_image_set(source: Path) -> bool:
    """Whether ``source`` is an archive, or a folder that is neither a run, a model nor a pipeline."""
    if source.is_dir():
        return not any((source / name).is_file() for name in MODEL_FILES)
    return source.name.lower().endswith((*ARCHIVES, *COMPRESSED))


def list_images(source: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Listing:
    """The images of a folder (with its subfolders, but not with linked ones) or an archive.

    Raises ``UserError`` if the source is missing, unreadable, compressed as a whole, or of another type.
    """
    readers = {".zip": _list_zip, ".tar": _list_tar, ".npz": _list_npz}
    with reading(source, "folder or archive of images"):
        if source.is_dir():
            return _list_folder(source, suffixes)
        if (reader := readers.get(source.suffix.lower())) is not None and source.exists():
            return reader(source)
    archives = ", ".join(ARCHIVES)
    if not source.exists():
        raise UserError(f"{source} does not exist; give a folder of images or an archive ({archives}).")
    if source.name.lower().endswith(COMPRESSED):
        raise UserError(f"{source} is compressed as a whole, so it has no random access; unpack it first.")
    raise UserError(f"{source} is neither a folder of images nor an archive ({archives}).")


def describe_left_out(left_out: Mapping[str, str]) -> str:
    """``"2 files left out: a.tif and 1 more (its type is not read)"``; empty if there are none."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    groups = [
        f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''} ({reason})"
        for reason, names in reasons.items()
    ]
    return f"{len(left_out):,} file{'s' if len(left_out) > 1 else ''} left out: {', '.join(groups)}" if groups else ""


def _list_folder(source: Path, suffixes: tuple[str, ...]) -> Listing:
    names, left_out = list[str](), dict[str, str]()
    for root, folders, files in os.walk(source):
        relative = Path(root).relative_to(source)
        for folder in sorted(folders):
            if (Path(root) / folder).is_symlink():
                left_out[str(relative / folder)] = "linked folders are not followed"
            elif folder.lower().endswith(suffixes):
                left_out[str(relative / folder)] = "it is a folder"
        for file in sorted(files):
            if file.lower().endswith(suffixes):
                names.append(str(relative / file))
            else:
                left_out[str(relative / file)] = _unread(file)
    return Listing(sorted(names, key=natural_key), lambda name: (source / name).read_bytes(), left_out)


def _list_zip(source: Path) -> Listing:
    archive = zipfile.ZipFile(source)  # thread-safe for reading
    if large := [info.filename for info in archive.infolist() if info.file_size > MAX_BYTES]:
        raise UserError(f"{source}: {large[0]} would unpack to more than {MAX_BYTES:,} bytes.")
    members = [name for name in archive.namelist() if not name.endswith("/")]
    names, left_out = _chosen(members)
    return Listing(names, archive.read, left_out)


def _list_tar(source: Path) -> Listing:
    with tarfile.open(source, "r:") as archive:
        members = [member for member in archive if not member.isdir()]
    names, left_out = _chosen(member.name for member in members if member.isreg())
    left_out |= {member.name: "it is not a regular file" for member in members if not member.isreg()}
    ranges = {member.name: (member.offset_data, member.size) for member in members if member.isreg()}
    return Listing(names, lambda name: _read_range(source, *ranges[name]), left_out)


def _list_npz(source: Path) -> Listing:
    with np.load(source, allow_pickle=False) as arrays:
        first, *others = arrays.files
        images = arrays[first]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{source} must contain uint8 images [N, H, W, 3], got {images.dtype} {images.shape}.")
    names = [str(k) for k in range(len(images))]
    return Listing(names, lambda name: images[int(name)], dict.fromkeys(others, "it is a further array"))


def _chosen(members: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The images among the members of an archive; of several with one name, the last is what unpacking leaves."""
    names, left_out, repeats = dict[str, None](), dict[str, str](), 0
    for name in members:
        if not name.lower().endswith(IMAGE_SUFFIXES):
            left_out[name] = _unread(name)
        elif name in names:
            repeats += 1
            left_out[f"{name} ({repeats})"] = "an earlier member of the same name"
        else:
            names[name] = None
    return sorted(names, key=natural_key), left_out


def _unread(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return f"files of type {suffix} are not read" if suffix else "it has no suffix of an image"


def _read_range(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
