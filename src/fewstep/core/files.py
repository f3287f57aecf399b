"""Files and folders written atomically, and read with clear errors: safetensors, prompts, hashes."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count
from math import prod
from pathlib import Path
from secrets import token_hex

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.finite import first_non_finite


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``file`` that is renamed to it on success. Creates the parent folder.

    A full disk, a killed process or a power cut leaves the old file or the new one, never a part of one; of several
    writers at once, each writes its own and the last one stays. The file's permissions are those that the umask gives,
    whatever wrote it. Raises ``UserError`` if it cannot be written.
    """
    try:
        with _temporary(file.with_name(file.name + ".part"), partial(Path.touch, exist_ok=False)) as temporary:
            permissions = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(permissions)  # safetensors allows only the owner to read
            _sync(temporary)
            temporary.replace(file)
        _sync(file.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritable(file, error) from error


@contextmanager
def atomic_folder(final: Path, *, new: bool = False) -> Iterator[Path]:
    """Yields a new temporary folder beside ``final`` that is renamed to it on success, instead of a folder that may be
    there: readers see the old folder or the new one, whole. Raises ``UserError`` if it cannot be written, and with
    ``new`` if another process has written there meanwhile."""
    try:
        with _temporary(partial_folder(final), Path.mkdir) as temporary:
            yield temporary
            if new:
                require_empty(final)
            replace_folder(temporary, final)
    except (OSError, SafetensorError) as error:
        raise _unwritable(final, error) from error


@contextmanager
def _temporary(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Creates ``path``, or if another process may be writing it one with a random name, and removes it on an error.

    Who writes holds a shared lock on the folder, and only who had it alone removes what a killed process left: so it is
    no file that is being written. A file system without locks keeps what is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_SH)
        try:
            create(path)
        except FileExistsError:
            create(path := path.with_suffix(f".{token_hex(4)}.part"))
        try:
            yield path
        except BaseException:
            _remove(path)
            raise
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # a child process may have inherited the descriptor
        os.close(folder)


def _remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with suppress(OSError):
            path.unlink()


def partial_folder(final: Path) -> Path:
    """Where a folder is while it is written or deleted by a single process."""
    return final.with_name(f".{final.name}.part")


def replace_folder(partial: Path, final: Path) -> None:
    """Renames the complete folder ``partial`` to ``final``, instead of a folder that may be there.

    If the process is killed, ``final`` is the old folder or the new one, or missing; then ``restore_folder(final)``
    restores the old one. Raises ``UserError`` if the folder cannot be replaced.
    """
    try:
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        restore_folder(final)
        old = _replaced(final)
        if os.path.lexists(final):  # also a link to nothing
            final.rename(old)
        partial.rename(final)
        _sync(final.parent)
        _remove(old)
    except OSError as error:
        raise _unwritable(final, error) from error


def restore_folder(final: Path) -> None:
    """Completes a ``replace_folder`` that was killed: restores the old folder if ``final`` is missing. Raises
    ``UserError`` if that fails."""
    old = _replaced(final)
    try:
        if os.path.lexists(final):
            _remove(old)
        elif old.exists():
            old.rename(final)
    except OSError as error:
        raise _unwritable(final, error) from error


def delete_folder(folder: Path) -> None:
    """Deletes a folder under another name, so that a killed process leaves no part of it under its own. Raises
    ``UserError`` if it cannot be renamed."""
    partial = partial_folder(folder)
    _remove(partial)
    try:
        folder.rename(partial)
    except OSError as error:
        raise UserError(f"Cannot delete {folder}: {error}.") from error
    _remove(partial)


def remove_leftovers(folder: Path, names: str = ".*.part") -> None:
    """Restores or deletes what a killed process left in ``folder``: folders that it was replacing, and files and
    folders with ``names`` that it was writing or deleting."""
    for old in folder.glob(".*.old"):
        restore_folder(folder / old.name.removeprefix(".").removesuffix(".old"))
    for path in folder.glob(names):
        _remove(path)


def require_empty(folder: Path) -> None:
    """Raises ``UserError`` if ``folder`` is a file, is ``.`` or ``..``, which no folder can be renamed to, or contains
    more than what a killed process left unfinished."""
    if folder.name in ("", ".."):
        raise UserError(f"{str(folder)!r} is where commands run, or above it; name a new folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder.")
    if folder.is_dir() and not all(path.name.endswith(".part") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder.")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_unused(file: Path, write: Callable[[Path], object]) -> Path:
    """Writes a file by ``write(path)`` and returns its name: ``file``, or if it exists the first of ``NAME-2.SUFFIX``,
    ... that does not, also of several writers at once. Raises ``UserError`` if it cannot be written."""
    names = chain([file], (file.with_stem(f"{file.stem}-{k}") for k in count(2)))
    try:
        with _temporary(partial_folder(file), Path.mkdir) as folder:
            write(folder / file.name)
            found = next(name for name in names if _renamed(folder / file.name, name))
            _remove(folder)
        _sync(file.parent)
    except OSError as error:
        raise _unwritable(file, error) from error
    return found


def _renamed(file: Path, name: Path) -> bool:
    """Renames a file, unless the name is taken."""
    try:
        os.link(file, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if name.exists():
            return False
        file.rename(name)
    return True


def check_writable(file: str | Path, *inputs: Path) -> None:
    """Checks, before long work, that its result can be written to ``file`` and does not overwrite one of its
    ``inputs``. Raises ``UserError`` otherwise."""
    file = Path(file)
    if file.resolve() in [each.resolve() for each in inputs]:
        raise UserError(f"{file} is an input, which the result would overwrite; name another file.")
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file.")
    try:
        with _temporary(file.with_name(f".{file.name}.part"), partial(Path.touch, exist_ok=False)) as trial:
            trial.unlink()
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: Exception) -> UserError:
    return UserError(f"Cannot write {file}: {error}. Free some space or choose another folder.")


def write_text(text: str, file: Path) -> None:
    """Writes a UTF-8 text file atomically. Raises ``UserError`` if it cannot be written."""
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Raises ``UserError`` if it cannot be written, or a number is not finite."""
    if (name := first_non_finite(tensors)) is not None:
        raise UserError(f"{file} was not written: {name} has numbers that are not finite.")
    with atomic_write(file) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


@contextmanager
def reading(file: object, kind: str, advice: str = "Restore it or regenerate it.") -> Iterator[None]:
    """Turns whatever is raised inside into a ``UserError`` that names ``file`` (or a place in one), what ``kind`` of
    file it should be, and the reason. Only the parser belongs inside: on damaged bytes parsers raise exceptions of
    almost every type."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist. {advice}") from error
    except Exception as error:
        raise UserError(f"{file} is not a readable {kind} ({reason_of(error)}). {advice}") from error


def reason_of(error: Exception) -> str:
    """The message of an error in one line; of several mistakes the first, with its place."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which is mapped into memory: they are read when they are used, and a change
    of them does not reach the file. Raises ``UserError`` if it is missing or damaged."""
    with reading(file, "safetensors file"):
        return load_file(file)


def tensor_names(file: Path) -> set[str]:
    """The tensor names in a safetensors file. Raises ``UserError`` if it is missing or damaged."""
    with reading(file, "safetensors file"), safe_open(file, framework="pt") as handle:
        return set(handle.keys())


def tensor_types(file: Path) -> list[tuple[str, int]]:
    """The type, as safetensors names it (``BF16``), and the number of elements of each tensor in a safetensors file.
    Raises ``UserError`` if it is missing or damaged."""
    with reading(file, "safetensors file"), safe_open(file, framework="pt") as handle:
        parts = [handle.get_slice(name) for name in handle.keys()]  # noqa: SIM118, a file's names, not a dict
        return [(part.get_dtype(), prod(part.get_shape())) for part in parts]


def read_metadata(file: Path) -> dict[str, str]:
    """The string metadata of a safetensors file. Raises ``UserError`` if it is missing or damaged."""
    with reading(file, "safetensors file"), safe_open(file, framework="pt") as handle:
        return handle.metadata() or {}


def read_prompts(file: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line. Raises ``UserError`` that names an empty or unreadable line."""
    with reading(file, "text file of prompts", "Give a text file, one prompt per line."):
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    prompts = []
    for number, raw in enumerate(content.splitlines(), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number} is not UTF-8 ({error.reason}); save the file as UTF-8.") from error
        if not line:
            raise UserError(f"{file}, line {number} is empty; every line must be a prompt.")
        prompts.append(line)
    if not prompts:
        raise UserError(f"{file} contains no prompts.")
    return prompts


def sha256(*files: Path) -> str:
    """SHA-256 of the bytes of one file, or of several concatenated, in hex."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
