"""Several writers of one file or folder at once, and what killed ones left."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
from killed import Killed

from fewstep.core import files
from fewstep.core.errors import UserError
from fewstep.core.files import atomic_folder, atomic_write, check_writable, write_text, write_unused


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with atomic_write(file) as first:
        first.write_text("first")
        with atomic_write(file) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert file.read_text() == "second"
        with suppress(Killed), atomic_write(file):
            raise Killed
        check_writable(file)
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_of_a_folder_do_not_mix(tmp_path: Path) -> None:
    final = tmp_path / "student"
    with atomic_folder(final) as first:
        (first / "a").write_text("first")
        with atomic_folder(final) as second:
            (second / "b").write_text("second")
        assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in final.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_new_folder_replaces_none_that_was_written_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty"), atomic_folder(tmp_path / "a", new=True):
        write_text("first", tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


def test_a_writer_that_finishes_first_leaves_the_name_that_another_took_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a temporary file is renamed, its name is free: another writer's file under it is not removed."""
    sync, others = files._sync, []

    def begin_another(path: Path) -> None:
        sync(path)
        if path == tmp_path and not others:
            others.append(atomic_write(tmp_path / "a.txt"))
            others[0].__enter__().write_text("other")

    monkeypatch.setattr(files, "_sync", begin_another)
    write_text("text", tmp_path / "a.txt")
    others[0].__exit__(None, None, None)
    assert (tmp_path / "a.txt").read_text() == "other"


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_what_a_killed_writer_left_is_removed_unless_one_may_still_write_it(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    name = "a.txt.part" if write is atomic_write else ".a.txt.part"
    (tmp_path / name).mkdir()
    (tmp_path / name / "half").touch()
    with atomic_write(tmp_path / "other"), write(tmp_path / "a.txt"):
        assert (tmp_path / name / "half").exists(), "whose it is cannot be known"
    with write(tmp_path / "a.txt"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "other"}


def test_without_locks_nothing_is_taken_for_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "a.txt.part").touch()
    write_text("text", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "text"
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "a.txt.part"}


@pytest.mark.parametrize("links", [True, False])
def test_a_free_name_is_taken_by_one_writer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Both begin when neither has written."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file, found = tmp_path / "grid.png", []

    def write(path: Path) -> None:
        found.append(write_unused(file, lambda other: other.write_text("first")))
        path.write_text("second")

    found.append(write_unused(file, write))
    assert found == [file, tmp_path / "grid-2.png"]
    assert [path.read_text() for path in found] == ["first", "second"]
    assert write_unused(file, lambda path: path.write_text("third")) == tmp_path / "grid-3.png"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_free_name_on_a_full_disk(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"Cannot write .*grid.png: .*No space left on device"):
        write_unused(tmp_path / "grid.png", full)
    assert not list(tmp_path.iterdir())
