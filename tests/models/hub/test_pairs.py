"""Preference pairs of image files: the table that names them, and their latents."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from preference_tables import COLUMNS, Row, write_images, write_table
from safetensors.torch import save_file

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.core.image_files import image_size, read_image
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.sources import Prompts
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.pairs import read_pairs

pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
ROWS: list[Row] = [("0.png", "1.png", "a cat"), ("2.png", "0.png", "two dogs"), ("1.png", "2.png", "a cat")]
ROW = ("0.png", "1.png", "a cat")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write_images(folder, {f"{k}.png": (16, 16) for k in range(3)})
    (tmp_path / "secret.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "more").mkdir()
    (folder / "more" / "a.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_names_files_in_its_folder(images: Path, suffix: str) -> None:
    rows: list[Row] = [*ROWS, ("more/a.png", "more/../2.png", " the sea ")]
    pairs = read_pairs(write_table(images / f"pairs.{suffix}", rows))
    assert [pair.caption for pair in pairs] == ["a cat", "two dogs", "a cat", "the sea"]
    assert [pair.winner for pair in pairs] == [images / str(row[0]) for row in rows]
    assert pairs[3].loser.resolve() == images / "2.png"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("../secret.png", "1.png", "a"), r"row 2: '\.\./secret\.png' is outside"),
        (("0.png", "link.png", "a"), r"row 2: 'link\.png' is outside .* the folder of the table"),
        (("/etc/hostname.png", "1.png", "a"), "row 2: '/etc/hostname.png' is outside"),
        (("loop.png", "1.png", "a"), "row 2: 'loop.png'"),
        (("9.png", "1.png", "a"), r"row 2: '9\.png' does not exist in"),
        (("more", "1.png", "a"), "row 2: 'more' does not exist in"),
        (("x" * 5000 + ".png", "1.png", "a"), "row 2: 'xxx"),
        (("notes.txt", "1.png", "a"), r"row 2: 'notes\.txt' is not one of \.png"),
        (("0.png", "more/../0.png", "a"), r"row 2: winner and loser are one file, 0\.png"),
        (("0.png", "1.png", "a\nb"), "row 2: a caption must be one line"),
        (("0.png", "1.png", " "), "row 2 has no winner or no loser or no caption"),
        (("", "1.png", "a"), "row 2 has no winner"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(images: Path, suffix: str, row: Row, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs(write_table(images / f"pairs.{suffix}", [ROW, row]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"winner,loser,caption\n", "a.csv contains no captions"),
        ("a.csv", b"winner,caption\n0.png,a\n", "row 1 has no winner or no loser"),
        ("a.csv", b"winner,loser,caption\n0.png,\xff,a\n", "row 1 is not readable"),
        ("a.csv", b"winner,loser,caption\n\x00.png,1.png,a\n", "a.csv"),
        ("a.csv", b"winner,loser,caption\n" + b"x" * 200_000 + b",b,c\n", "row 1 is not readable"),
        ("a.jsonl", b"", "contains no captions"),
        ("a.jsonl", b"[1, 2]\n", "row 1 has no winner"),
        ("a.jsonl", b'{"winner": 1, "loser": "1.png", "caption": "a"}\n', "row 1: the winner must be a text"),
        ("a.jsonl", b'{"winner": "0.png"', "row 1 is not readable"),
        ("a.jsonl", b"[" * 100_000, "row 1 is not readable"),
        ("a.jsonl", b'{"winner": "0.png", "loser": "1.png", "caption": "\\ud800"}\n', "row 1 is not readable"),
        ("a.jsonl", b'{"winner": "\\u0000.png", "loser": "1.png", "caption": "a"}\n', "is not the name of a file"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused(images: Path, name: str, content: bytes, message: str) -> None:
    (images / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pairs(images / name)
    with pytest.raises(UserError, match=r"missing\.csv does not exist"):
        read_pairs(images / "missing.csv")


cell = st.one_of(st.text(max_size=8), st.sampled_from(["0.png", "../0.png", "1.png", "..", "/", "\0"]), st.integers())


@hypothesis_settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=80), st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=3)))
def test_no_table_ends_in_another_error(images: Path, content: bytes | list[Row]) -> None:
    for suffix in ("csv", "jsonl"):
        table = images / f"any.{suffix}"
        if isinstance(content, bytes):
            table.write_bytes(b"winner,loser,caption\n" + content)
        else:
            with suppress(UnicodeEncodeError):  # a surrogate, which the file of the test cannot contain either
                write_table(table, content)
        with suppress(UserError):
            for pair in read_pairs(table):
                assert images in pair.winner.resolve().parents


@pytest.mark.parametrize("reader", [read_image, image_size])
def test_damaged_and_enormous_images_are_refused(
    tmp_path: Path, reader: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, {"a.png": (64, 64)})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are refused by Pillow
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        reader(tmp_path / "a.png")


def test_pairs_become_latents_with_prompts(saved: Saved, images: Path, tmp_path: Path) -> None:
    table, out = write_table(images / "pairs.csv", ROWS), tmp_path / "out"
    assert fewstep.encode(saved("sd"), table, out, batch=2, rows=2, device="cpu") == 3
    stored = EncodedPrompts(out)
    [(latents, prompts)] = stored.buckets
    assert prompts.tolist() == [0, 1, 0]
    folder = PipelineFolder.open(saved("sd"))
    pixels = torch.stack([read_image(images / f"{k}.png") for k in range(3)]).float() / 127.5 - 1
    with torch.no_grad():
        expected = folder.family.encode_images(folder.pipeline(), pixels)
        texts = folder.condition(folder.pipeline(), ["a cat", "two dogs"])
    torch.testing.assert_close(latents["winner"], expected[[0, 2, 1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents["loser"], expected[[1, 0, 2]], rtol=1e-4, atol=1e-4)
    batch = Prompts(stored, [(4, 8, 8)])(KeyedRandom(0, 0, "data", 0), 8)
    assert set(batch) == {"winner", "loser"}
    seen = set()
    for k in range(8):  # winner, loser and condition belong to one pair
        row = int((latents["winner"] - batch["winner"][k]).flatten(1).abs().sum(1).argmin())
        seen.add(row)
        assert torch.equal(batch["loser"][k], latents["loser"][row])
        torch.testing.assert_close(batch.condition["prompt"][k], texts["prompt"][prompts[row]], rtol=1e-4, atol=1e-4)
    assert seen == {0, 1, 2}


def test_encoding_pairs_continues_and_other_pairs_are_refused(saved: Saved, images: Path, tmp_path: Path) -> None:
    table, out = write_table(images / "pairs.csv", ROWS), tmp_path / "out"
    fewstep.encode(saved("sd"), table, out, rows=2, device="cpu")
    first = read_tensors(out / "pairs-00001.safetensors")
    kept = (out / "pairs-00000.safetensors").stat().st_mtime_ns
    (out / "pairs-00001.safetensors").unlink()
    with pytest.raises(UserError, match="is incomplete: repeat the fewstep data command"):
        EncodedPrompts(out)
    fewstep.encode(saved("sd"), table, out, rows=2, device="cpu")
    again = read_tensors(out / "pairs-00001.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert (out / "pairs-00000.safetensors").stat().st_mtime_ns == kept
    swapped = write_table(images / "pairs.csv", [ROWS[0], ("0.png", "2.png", "two dogs"), ROWS[2]])
    with pytest.raises(UserError, match="contains other prompts or samples"):
        fewstep.encode(saved("sd"), swapped, out, rows=2, device="cpu")
    with pytest.raises(UserError, match="is a file; name a folder"):
        fewstep.encode(saved("sd"), table, table, device="cpu")


def test_images_need_a_vae(saved: Saved, images: Path, tmp_path: Path) -> None:
    shutil.copytree(saved("sd"), tmp_path / "sd")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    (images / "0.txt").write_text("a cat")
    for source in (write_table(images / "pairs.csv", ROWS), images):
        with pytest.raises(UserError, match="sd has no VAE, which turns images into latents"):
            fewstep.encode(tmp_path / "sd", source, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_both_images_of_a_pair_get_the_size_of_the_winner(saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, {"square.png": (20, 20), "wide.png": (60, 32), "tall.png": (30, 64)})
    rows: list[Row] = [("square.png", "wide.png", "a"), ("wide.png", "tall.png", "b"), ("tall.png", "square.png", "c")]
    table, sizes = write_table(folder / "pairs.jsonl", rows), [(16, 16), (16, 32), (32, 16)]
    fewstep.encode(saved("sd"), table, tmp_path / "out", sizes=sizes, device="cpu")
    buckets = EncodedPrompts(tmp_path / "out").buckets
    shapes = {
        int(prompts): [tuple(latents[name].shape[1:]) for name in ("winner", "loser")] for latents, prompts in buckets
    }
    assert shapes == {0: [(4, 8, 8)] * 2, 1: [(4, 8, 16)] * 2, 2: [(4, 16, 8)] * 2}
    source = Prompts(EncodedPrompts(tmp_path / "out"), [(4, 8, 8)])
    found = Counter(source(KeyedRandom(0, step, "data", 0), 2).shape for step in range(40))
    assert set(found) == {(4, 8, 8), (4, 8, 16), (4, 16, 8)}
    with pytest.raises(UserError, match="differ in size; resize them, or set --sizes"):
        fewstep.encode(saved("sd"), table, tmp_path / "other", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": torch.tensor([0, 5])}, "one of the 2 numbers"),
        ({"prompt": torch.tensor([0.0, 1.0])}, "is damaged: it needs prompt, and winner and loser of one shape"),
        ({"loser": torch.zeros(2, 4, 8, 4)}, "is damaged: it needs prompt, and winner and loser of one shape"),
        ({"loser": torch.full((2, 4, 8, 8), torch.nan)}, "a latent is not finite"),
        ({"x0": torch.zeros(2, 4, 8, 8)}, "is damaged"),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused(
    saved: Saved, images: Path, tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    table, out = write_table(images / "pairs.csv", ROWS[:2], COLUMNS), tmp_path / "out"
    fewstep.encode(saved("sd"), table, out, device="cpu")
    file = out / "pairs-00000.safetensors"
    save_file(read_tensors(file) | change, file)
    with pytest.raises(UserError, match=message):
        EncodedPrompts(out)
