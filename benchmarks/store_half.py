"""Stores the numbers of a safetensors file in 16 bits, half the size of float32, for files that ship with the package.

    python benchmarks/store_half.py runs/emoji_teacher/student/model.safetensors models/bundled/emoji/model.safetensors

They are read as float32. float16, the default, is more exact, and a number that it cannot hold is an error; a wheel
compresses bfloat16 better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fewstep.core.files import read_tensors, write_tensors


def store_half(source: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    tensors = read_tensors(source)
    write_tensors({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=["float16", "bfloat16"], default="float16")
    arguments = parser.parse_args()
    store_half(arguments.source, arguments.out, getattr(torch, arguments.type))
