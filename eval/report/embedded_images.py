"""Images and videos of a run, encoded for its page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

MAXIMUM_SAMPLES = 8


class EmbeddedImage(NamedTuple):
    """An image file as base64; ``kind`` is its media type."""

    caption: str
    data: str
    width: int
    height: int
    kind: str


def embed_image(file: Path, caption: str, remarks: list[str]) -> EmbeddedImage | None:
    """None, with a remark, if the image is missing or damaged."""
    try:
        with Image.open(file) as image:
            image.load()
            data = base64.b64encode(file.read_bytes()).decode()
            return EmbeddedImage(caption, data, *image.size, Image.MIME[image.format or "PNG"])
    except Exception:  # on damage Pillow raises exceptions of almost every type
        remarks.append(f"There is no {'readable ' * file.exists()}image {file.parent.name}/{file.name}.")
        return None


def embed_video(file: Path) -> str:
    """An MP4 file as base64; empty if it does not exist."""
    return base64.b64encode(file.read_bytes()).decode() if file.is_file() else ""


def embed_steps(folder: Path, remarks: list[str]) -> list[EmbeddedImage]:
    """Some of the images ``step-....png`` in a folder, evenly spaced, with the first and the last; none if there are
    none."""
    files = sorted(folder.glob("step-*.png"))
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, MAXIMUM_SAMPLES)}) if files else []
    if len(chosen) < len(files):
        remarks.append(f"{len(chosen)} of {len(files)} images in {folder.name}/ are shown.")
    steps = [(files[i], files[i].stem.removeprefix("step-").lstrip("0") or "0") for i in chosen]
    images = [embed_image(file, f"Step {step}", remarks) for file, step in steps]
    return [image for image in images if image is not None]
