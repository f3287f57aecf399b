"""Files are written atomically or not at all, and damage is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.core.files import (
    atomic_write,
    check_writable,
    read_metadata,
    read_prompts,
    read_tensors,
    tensor_names,
    write_tensors,
    write_text,
)  # fmt: skip


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
