"""Folders of images with a table of preference pairs, as a user would write them, and a reward of theirs."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLUMNS = ("winner", "loser", "caption")
Row = Sequence[object]


def write_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Random images by name; sizes are width and height."""
    folder.mkdir(exist_ok=True)
    numbers = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)


def write_table(file: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    """A .csv or a .jsonl file."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        return file
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file


def prefers_cats(network: object, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """One reward for all images of other prompts."""
    return torch.stack([image.float().mean() * ("cat" in text) for image, text in zip(images, prompts, strict=True)])
