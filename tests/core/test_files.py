"""Files are written atomically or not at all, and damage is reported."""

from __future__ import annotations

import codecs
import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import Killed, kill_at

from fewstep.core.errors import UserError
from fewstep.core.files import (
    atomic_write,
    check_writable,
    read_metadata,
    read_prompts,
    read_tensors,
    replace_folder,
    restore_folder,
    tensor_names,
    write_tensors,
    write_text,
)
from fewstep.core.image_grid import save_grid
from fewstep.core.json_files import read_json_lines, read_json_object
from fewstep.core.tables import read_table
from fewstep.distill.metrics_logger import append_line


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.txt"
    write_text("old", file)

    class Full(OSError):
        pass

    def fail() -> None:
        with atomic_write(file) as temporary:
            temporary.write_text("half of the n")
            raise Full("No space left on device")

    with pytest.raises(UserError, match=r"Cannot write .*b.txt: No space left.*Free some space"):
        fail()
    assert file.read_text() == "old"
    assert [path.name for path in file.parent.iterdir()] == ["b.txt"]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_of_files_are_those_of_the_umask(tmp_path: Path, mask: int, expected: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
        write_text("text", tmp_path / "a.txt")
        save_grid(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), tmp_path / "a.png", columns=1)
        with atomic_write(tmp_path / "a.npz") as temporary, temporary.open("wb") as stream:
            np.savez(stream, a=np.zeros(3))
    finally:
        os.umask(before)
    assert {file.name: mode(file) for file in tmp_path.iterdir()} == dict.fromkeys(
        ("a.safetensors", "a.txt", "a.png", "a.npz"), expected
    )


def test_contents_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut can leave an empty file under the final name."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def record(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "replace", renamed)
    write_text("text", tmp_path / "a.txt")
    assert events == ["sync a.txt.part", "rename a.txt.part", f"sync {tmp_path.name}"]


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "sub").mkdir()
    (path / "sub" / "file.txt").write_text(text)
    return path


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "student"
    for text in ("first", "second"):
        replace_folder(folder_of(tmp_path / "part", text), final)
        assert (final / "sub" / "file.txt").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["student"]
    with pytest.raises(UserError, match="Cannot write"):
        replace_folder(tmp_path / "none", final)
    assert (final / "sub" / "file.txt").read_text() == "second"


def test_a_file_or_a_link_to_nothing_is_replaced_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("file", "link"):
        (tmp_path / "file").write_text("not a folder") if name == "file" else (tmp_path / "link").symlink_to("nothing")
        final = tmp_path / name
        replace_folder(folder_of(tmp_path / "part", "new"), final)
        assert (final / "sub" / "file.txt").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


@pytest.mark.parametrize("calls", range(12))
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The process dies before its call number ``calls`` of the functions that change or flush anything."""
    final = folder_of(tmp_path / "student", "old")
    partial = folder_of(tmp_path / "part", "new")
    with monkeypatch.context() as patch:
        kill_at(patch, calls, ((os, "fsync"), (Path, "rename"), (os, "unlink"), (os, "rmdir")))
        with suppress(Killed):
            replace_folder(partial, final)
    restore_folder(final)
    assert (final / "sub" / "file.txt").read_text() in ("old", "new")
    rest = {path.name for path in tmp_path.iterdir()}
    assert rest <= {"student", "part"}
    if (final / "sub" / "file.txt").read_text() == "old":
        assert "part" in rest  # the new one is not lost either
    replace_folder(folder_of(tmp_path / "again", "third"), final)
    assert (final / "sub" / "file.txt").read_text() == "third"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable JSON file"),
        (b"{", "is not a readable JSON file"),
        (b'{"a": "\xff"}', "is not a readable JSON file .*utf-8"),
        (b"[" * 100_000, "is not a readable JSON file .*recursion"),
        (b"9" * 5_000, "is not a readable JSON file .*digits"),
        (b"3", "must contain a JSON object, not a number"),
        (b"null", "must contain a JSON object, not nothing"),
    ],
)
def test_json_files_that_hold_no_object_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"state\.json {message}"):
        read_json_object(tmp_path / "state.json")


def test_half_a_last_line_is_skipped_counted_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, {"step": 1})
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo')
    append_line(file, {"step": 3})
    append_line(file, {"step": 4})
    assert read_json_lines(file) == ([{"step": 1}, {"step": 3}, {"step": 4}], 1)
    file.write_bytes(b'3\n\xff\n[]\n\n{"step": 5}')
    assert read_json_lines(file) == ([{"step": 5}], 3)
    with pytest.raises(UserError, match="does not exist"):
        read_json_lines(tmp_path / "none.jsonl")


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        header({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        header({"a": 3}),
    ],
)
def test_safetensors_with_wrong_headers_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    for read in (read_tensors, tensor_names, read_metadata):
        with pytest.raises(UserError, match=r"x\.safetensors is not a readable safetensors file"):
            read(file)


def test_tensors_and_metadata_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}
    write_tensors(tensors, file, {"made": "by a test"})
    read = read_tensors(file)
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    assert tensor_names(file) == {"a", "b"}
    assert read_metadata(file) == {"made": "by a test"}


def test_missing_and_damaged_tensor_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_tensors(tmp_path / "x.safetensors")
    write_tensors({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[: len(content) // 2])
    for read in (read_tensors, tensor_names):
        with pytest.raises(UserError, match="is not a readable safetensors file"):
            read(tmp_path / "x.safetensors")


def test_writability_is_checked_without_leaving_anything(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file.json")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        check_writable(tmp_path / "plain" / "file.json")
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_writable(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no prompts"),
        (b"a cat\n\na dog\n", "line 2 is empty"),
        (b"a cat\n\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_bad_prompts_are_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_prompts_are_read_in_order_and_stripped(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("  ein Hütchen \na dog\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["ein Hütchen", "a dog"]
    with pytest.raises(UserError, match=r"none\.txt does not exist\. Give a text file, one prompt per line"):
        read_prompts(tmp_path / "none.txt")


def test_the_byte_order_mark_of_an_editor_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(codecs.BOM_UTF8 + "ein Hütchen\r\na dog\r\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["ein Hütchen", "a dog"]
    (tmp_path / "prompts.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(UserError, match="contains no prompts"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.csv", [b"caption,file", b'"a, ""cat""",1.png', b"", "ein Hütchen,2.png".encode(), b""]),
        ("a.jsonl", [b'{"file": "1.png", "caption": "a, \\"cat\\""}', b" ",
                     '{"caption": "ein Hütchen", "file": "2.png", "more": 1}'.encode(), b""]),
    ],
)  # fmt: skip
def test_tables_of_any_editor_are_read(tmp_path: Path, name: str, lines: list[bytes], end: bytes, mark: bytes) -> None:
    (tmp_path / name).write_bytes(mark + end.join(lines) + end)
    rows = read_table(tmp_path / name, ("file", "caption"))
    assert rows == [("1.png", 'a, "cat"'), ("2.png", "ein Hütchen")]


GOOD = b'{"file": "a", "caption": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"file,caption\n1.png,a cat\n2.png,a cat, asleep\n", "row 2 .*more cells than the header"),
        ("a.csv", b'file,caption\n1.png,a cat\n2.png,"a dog\n3.png,the sea\n', "row 2 is not readable"),
        ("a.csv", b"file,caption\n1.png,a cat\n2.png,a d\xffg\n", "row 2 is not readable .*utf-8"),
        ("a.csv", b"file,caption,caption\n1.png,a,b\n", "header has caption twice"),
        ("a.jsonl", 2 * GOOD + b'{"file": "a",\n' + GOOD, "row 3 is not readable"),
        ("a.jsonl", GOOD + b'{"file": "a", "caption": "\xe9"}\n' + GOOD, "row 2 is not readable .*utf-8"),
        ("a.jsonl", GOOD + b'{"file": "a", "caption": "\\ud800"}\n', "row 2 is not readable"),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "row 2 is not readable"),
    ],
)  # fmt: skip
def test_a_damaged_row_of_a_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """In particular one whose text would lose what follows a comma, or swallow the rows after it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name, ("file", "caption"))
