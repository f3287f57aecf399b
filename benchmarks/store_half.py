"""Stores the numbers of a safetensors file as float16, half the size of float32, for files that ship with the package.

    python benchmarks/store_half.py runs/emoji_teacher/student/model.safetensors models/bundled/emoji/model.safetensors

They are read as float32. A number that float16 cannot hold is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep.core.files import read_tensors, write_tensors


def store_half(source: Path, out: Path) -> None:
    tensors = read_tensors(source)
    write_tensors({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, out)


if __name__ == "__main__":
    store_half(*map(Path, sys.argv[1:]))
