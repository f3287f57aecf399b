"""The same five colour images, labels and captions in every form that can be read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image

from fewstep.core.image_data import ImageData

PIXELS = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
CLASSES = ("bee", "cat", "dog")
LABELS = [1, 2, 1, 0, 2]
CAPTIONS = [f"NA {CLASSES[label]}, drawn" for label in LABELS]
NAMES = [CLASSES[label] for label in LABELS]
COLOURS = {"blue": (20, 40, 220), "green": (20, 200, 40), "red": (220, 30, 30)}


def png(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def pictures(folder: Path, n: int, size: int = 12, classes: bool = True, seed: int = 0) -> Path:
    """Noisy pictures of three colours, ``n`` of each, in a folder for each or in one."""
    numbers = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        place = folder / name if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        for k in range(n):
            pixels = np.clip(np.array(colour) + numbers.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{name}_{k}.png")
    return folder


def files(folder: Path) -> None:
    """The images as files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(PIXELS):
        (folder / f"{k}.png").write_bytes(png(pixels))


def class_folders(folder: Path) -> ImageData:
    for k, pixels in enumerate(PIXELS):
        (folder / NAMES[k]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[k] / f"{k}.png").write_bytes(png(pixels))
    return ImageData("folder", str(folder))


def npz(folder: Path, channels: str = "last", texts: bool = True) -> ImageData:
    images = PIXELS if channels == "last" else PIXELS.transpose(0, 3, 1, 2)
    np.savez(folder / "a.npz", images=images, labels=NAMES if texts else np.array(LABELS)[:, None])
    return ImageData("npz", str(folder / "a.npz"))


def csv(folder: Path) -> ImageData:
    files(folder / "pictures")
    lines = [f'pictures/{k}.png,{NAMES[k]},"{CAPTIONS[k]}"\n' for k in range(5)]
    (folder / "a.csv").write_text("".join(["file_name,label,text\n", *lines]))
    return ImageData("dataset", str(folder / "a.csv"))


def jsonl(folder: Path) -> ImageData:
    files(folder)
    lines = [f'{{"image": "{k}.png", "label": "{NAMES[k]}", "caption": "{CAPTIONS[k]}"}}\n' for k in range(5)]
    (folder / "a.jsonl").write_text("".join(lines))
    return ImageData("dataset", str(folder / "a.jsonl"))


def arrow() -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASSES)),
            "caption": datasets.Value("string"),
        }
    )
    images = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    return datasets.Dataset.from_dict({"image": images, "label": LABELS, "caption": CAPTIONS}, features=features)


def parquet(folder: Path) -> ImageData:
    arrow().to_parquet(str(folder / "a.parquet"))
    return ImageData("dataset", str(folder / "a.parquet"))


def parquet_of_bytes(folder: Path) -> ImageData:
    """Columns of other names, without what ``datasets`` adds to its files."""
    columns = {"png": [png(pixels) for pixels in PIXELS], "cls": NAMES, "txt": CAPTIONS}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "b.parquet")
    return ImageData("dataset", str(folder / "b.parquet"))


def webdataset(folder: Path) -> ImageData:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for k, pixels in enumerate(PIXELS):
            for suffix, content in (
                ("png", png(pixels)),
                ("cls", str(LABELS[k]).encode()),
                ("txt", CAPTIONS[k].encode()),
            ):
                entry = tarfile.TarInfo(f"{k:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return ImageData("dataset", str(folder / "a.tar"))


def with_metadata(folder: Path) -> ImageData:
    files(folder / "set")
    lines = [f'{k}.png,{NAMES[k]},"{CAPTIONS[k]}"\n' for k in range(5)]
    (folder / "set" / "metadata.csv").write_text("".join(["file_name,label,text\n", *lines]))
    return ImageData("dataset", str(folder / "set"))


def saved(folder: Path) -> ImageData:
    arrow().save_to_disk(str(folder / "saved"))
    return ImageData("dataset", str(folder / "saved"))


def saved_splits(folder: Path) -> ImageData:
    datasets.DatasetDict({"train": arrow().select([0]), "test": arrow()}).save_to_disk(str(folder / "splits"))
    return ImageData("dataset", str(folder / "splits"), split="test")


FORMS: dict[str, Callable[[Path], ImageData]] = {
    "npz": npz, "npz of integers, channels first": lambda folder: npz(folder, "first", texts=False), "csv": csv,
    "jsonl": jsonl, "parquet": parquet, "parquet of bytes": parquet_of_bytes, "webdataset": webdataset,
    "imagefolder with metadata": with_metadata, "saved": saved, "saved splits": saved_splits,
}  # fmt: skip
