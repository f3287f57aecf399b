"""Encoding prompts, and images with captions, that a table names or holds: as from text files and folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from commands import refused, succeeds
from image_sets import PIXELS, files, png
from PIL import Image
from preference_tables import write_table

import fewstep
from fewstep.core.errors import UserError
from fewstep.models.hub.encoded import EncodedPrompts

pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
CAPTIONS = ["a cat, asleep", "two dogs", "a cat, asleep", "NA", "the sea"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(file: Path, **columns: list[object]) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(str(file))
    return file


def as_table(folder: Path, suffix: str) -> Path:
    if suffix == "parquet":
        return parquet(folder / "a.parquet", key=[1, 2, 3, 4, 5], prompt=CAPTIONS)
    return write_table(folder / f"a.{suffix}", [(str(k), text) for k, text in enumerate(CAPTIONS)], ("key", "prompt"))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_prompts_of_a_table_are_those_of_a_text_file(suffix: str, saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(CAPTIONS) + "\n")
    assert fewstep.encode(saved("sd"), tmp_path / "a.txt", tmp_path / "lines", device="cpu") == 5
    assert fewstep.encode(saved("sd"), as_table(tmp_path, suffix), tmp_path / "table", device="cpu") == 5
    for name in ("prompts.txt", "index.json", "shard-00000.safetensors"):
        assert (tmp_path / "table" / name).read_bytes() == (tmp_path / "lines" / name).read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "parquet of names"])
def test_images_of_a_table_are_those_of_a_folder(suffix: str, saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    files(folder)
    for k, caption in enumerate(CAPTIONS):
        (folder / f"{k}.txt").write_text(caption)
    names = [f"{k}.png" for k in range(5)]
    if suffix == "parquet":
        table = parquet(tmp_path / "a.parquet", image=[png(pixels) for pixels in PIXELS], caption=CAPTIONS)
    elif suffix == "parquet of names":
        table = parquet(folder / "a.parquet", file_name=names, caption=CAPTIONS)
    else:
        table = write_table(folder / f"a.{suffix}", list(zip(names, CAPTIONS, strict=True)), ("file_name", "caption"))
    for source, out in ((folder, "folder"), (table, "table")):
        assert fewstep.encode(saved("sd"), source, tmp_path / out, sizes=[(16, 16)], device="cpu") == 5
    of_folder, of_table = (EncodedPrompts(tmp_path / out) for out in ("folder", "table"))
    [(expected, prompts)], [(latents, same)] = of_folder.buckets, of_table.buckets
    assert torch.equal(latents["x0"], expected["x0"])
    assert prompts.tolist() == same.tolist() == [0, 1, 0, 2, 3]
    assert (tmp_path / "table" / "index.json").read_text() == (tmp_path / "folder" / "index.json").read_text()


def test_the_column_of_captions_is_named_on_the_command_line(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(text, f"{text} again") for text in CAPTIONS]
    table = write_table(tmp_path / "a.csv", rows, ("text", "caption"))
    command = ["data", "encode", str(table), "--teacher", str(saved("sd")), "--out", str(tmp_path / "out")]
    assert "several columns that may be the caption; its columns are text, caption" in refused(capsys, *command)
    succeeds(*command, "--column", "caption", "--device", "cpu")
    assert (tmp_path / "out" / "prompts.txt").read_text().splitlines() == [f"{text} again" for text in CAPTIONS]


def test_what_does_not_fit_a_table_is_refused(saved: Saved, tmp_path: Path) -> None:
    files(tmp_path)
    pairs = write_table(tmp_path / "pairs.csv", [("0.png", "1.png", "a cat")])
    images = write_table(tmp_path / "images.csv", [("0.png", "a"), ("9.png", "b")], ("image", "caption"))
    videos = parquet(tmp_path / "a.parquet", image=[png(PIXELS[0])], caption=["a"])
    prompts = write_table(tmp_path / "prompts.csv", [("a", "b")], ("caption", "key"))
    (tmp_path / "0.txt").write_text("a")
    for given, options, message in (
        (pairs, {"column": "caption"}, "has preference pairs.*remove --column"),
        (images, {}, r"images\.csv, row 2: '9\.png' does not exist"),
        (videos, {"frames": 2}, r"videos are named by a \.csv or \.jsonl table"),
        (prompts, {"sizes": [(16, 16)]}, "holds prompts, without images"),
        (prompts, {"column": "titel"}, "no column 'titel'; its columns are caption, key"),
        (tmp_path, {"column": "caption"}, "is a folder, without columns"),
        (tmp_path / "0.txt", {"column": "caption"}, "is a text file of prompts, without columns"),
    ):
        with pytest.raises(UserError, match=message):
            fewstep.encode(saved("sd"), given, tmp_path / "out", device="cpu", **options)  # type: ignore[arg-type]


def test_a_damaged_image_in_a_table_is_named_by_its_row(saved: Saved, tmp_path: Path) -> None:
    cells = [png(PIXELS[0]), png(PIXELS[1])[:50]]
    table = parquet(tmp_path / "a.parquet", image=cells, caption=["a", "b"])
    with pytest.raises(UserError, match=r"a\.parquet, row 2 is not a readable image"):
        fewstep.encode(saved("sd"), table, tmp_path / "out", device="cpu")


def test_images_are_encoded_upright(saved: Saved, tmp_path: Path) -> None:
    for name, turned in (("straight", False), ("turned", True)):
        image = Image.fromarray(PIXELS[0]).resize((16, 32))
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").write_text("a")
        exif = Image.Exif()
        if turned:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(tmp_path / name / "0.png", exif=exif)
        fewstep.encode(saved("sd"), tmp_path / name, tmp_path / f"{name}_out", device="cpu")
    [(straight, _)], [(turned_back, _)] = (
        EncodedPrompts(tmp_path / f"{name}_out").buckets for name in ("straight", "turned")
    )
    assert torch.equal(straight["x0"], turned_back["x0"])
