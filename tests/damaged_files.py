"""Damaged and foreign versions of files, as hypothesis strategies, and ``fuzz``, which gives them to a reader.

A reader either reads a file or raises ``UserError``. ``fuzz`` tries it on random bytes, on valid files with bytes
changed, cut, inserted and doubled, on valid JSON and YAML with values and keys replaced, and on tensors of other
names, types and shapes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fewstep.core.errors import UserError
from fewstep.core.yaml_files import parse_yaml

PIECES = [
    *("{", "}", "[", "]", ",", ":", ": ", "- ", "? ", "&a ", "*a", "<<: ", "!!int ", "!x ", "| ", "> ", "'", '"', "#"),
    *("\n", "\n  ", "\t", "\r", "---\n", "...\n", "%YAML 1.1\n", "\0", "\x85", "\ufeff", "\U0001f600", "\\", "seed"),
    *("1:30", "2020-13-45", "yes", "null", "~", ".nan", "-.inf", "1e999", "010", "0x", "9" * 40, "1e-4", "true"),
]
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([10**18, 2**63, -(2**63), 10**400, "../x", "a:b", "nan", "__class__", "tdm", "unet"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A function that reads ``file`` of a folder. ``create`` writes a valid folder, ``others`` generates contents of
    the file that belong to its format. ``slow`` readers are tried on a fiftieth of the inputs."""

    file: str
    create: Callable[[Path], object]
    read: Callable[[Path], object]
    others: Callable[[bytes], st.SearchStrategy[bytes]] | None = None
    slow: bool = False


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with a few bytes changed, cut, inserted or doubled."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        kind, at = (
            draw(st.sampled_from(["change", "cut", "insert", "double", "end"])),
            draw(st.integers(0, len(content))),
        )
        length = draw(st.integers(1, 64))
        if kind == "change":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "double":
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@st.composite
def changed_value(draw: st.DrawFn, valid: Any) -> Any:
    """A value with some of what it contains replaced, removed or added."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found or draw(st.integers(0, 30)) == 0:
            return draw(VALUES)
        container, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                container[key] = draw(VALUES)
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=5))] = draw(VALUES)
            case _:
                container.insert(key, draw(VALUES))
    return value


def changed_json(valid: bytes) -> st.SearchStrategy[bytes]:
    return changed_value(json.loads(valid)).map(lambda value: json.dumps(value).encode())


def changed_lines(valid: bytes) -> st.SearchStrategy[bytes]:
    """JSON lines with one of them changed."""
    first, *rest = valid.splitlines(keepends=True)
    return changed_json(first).map(lambda line: line + b"\n" + b"".join(rest))


def changed_yaml(valid: bytes) -> st.SearchStrategy[bytes]:
    """Changed values, or pieces of YAML inserted into the text."""
    pieces = st.lists(st.tuples(st.integers(0, len(valid)), st.sampled_from(PIECES)), min_size=1, max_size=6)

    def inserted(pieces: list[tuple[int, str]]) -> bytes:
        text = valid
        for at, piece in pieces:
            text = text[:at] + piece.encode() + text[at:]
        return text

    texts = st.lists(st.sampled_from(PIECES), max_size=20).map(lambda parts: "".join(parts).encode())
    return st.one_of(
        changed_json(json.dumps(parse_yaml(valid.decode(), "valid")).encode()), pieces.map(inserted), texts
    )


@st.composite
def arrays(draw: st.DrawFn, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of any type and small shape under some of the names, or one more."""
    found: dict[str, torch.Tensor] = {}
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    for name in names:
        if draw(st.integers(0, 9)):
            own = shape if draw(st.integers(0, 3)) else draw(st.lists(st.integers(0, 4), max_size=4))
            fill = draw(st.sampled_from([0.0, 1.0, 7.0, -1.0, float("nan"), float("inf")]))
            found[name] = torch.full(own, fill).to(draw(st.sampled_from(DTYPES)))
    return found if draw(st.integers(0, 9)) else {**found, "other": torch.zeros(1)}


def other_tensors(*names: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: arrays(names).map(save)


def other_arrays(*names: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    def write(tensors: dict[str, torch.Tensor]) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **{n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()})
        return stream.getvalue()

    return lambda valid: arrays(names).map(write)


@dataclass
class Counts:
    """How many inputs were tried, read, and refused with ``UserError``; there is no other outcome."""

    inputs: int = 0
    read: int = 0
    refused: int = 0


def fuzz(reader: Reader, folder: Path, examples: int) -> Counts:
    """Reads ``examples`` versions of the reader's file. Raises whatever it raises but ``UserError``, with the smallest
    input that hypothesis finds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reader.create(folder)
    file, counts = folder / reader.file, Counts()
    valid = file.read_bytes()
    reader.read(folder)
    kinds = [damaged(valid), st.binary(max_size=64), st.binary(max_size=64).map(lambda tail: valid[:16] + tail)]
    if reader.others is not None:
        kinds += [reader.others(valid)] * 2

    @settings(
        max_examples=max(1, examples // 50) if reader.slow else examples, deadline=None, derandomize=True,
        database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(kinds))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        counts.inputs += 1
        try:
            reader.read(folder)
            counts.read += 1
        except UserError:
            counts.refused += 1

    check()
    return counts
