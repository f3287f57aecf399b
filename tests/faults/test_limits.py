"""Files that would take far more time or memory than their size are refused before that, by name."""

from __future__ import annotations

import gzip
import json
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from worlds import tiny_teacher

from fewstep.core.errors import UserError
from fewstep.core.idx_files import IDX_FILES, read_idx
from fewstep.core.image_files import read_image
from fewstep.distill.data.stored_files import read_stored
from fewstep.eval import image_sources
from fewstep.eval.networks.classifier import load_classifier
from fewstep.models.loading import load_model


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "unet", "widths": [8, 60_000]}}, "parameters, more than 500,000,000"),
        ({"backbone": {"name": "unet", "widths": [10**9, 10**9]}}, "Cannot build a network"),
        ({"backbone": {"name": "unet", "blocks": [1, 10**9]}}, "are more than 1000"),
        ({"backbone": {"name": "unet", "embedding": 10**7}}, "parameters, more than 500,000,000"),
        ({"backbone": {"name": "unet", "heads": 0}}, "must be positive"),
        ({"backbone": {"name": "unet", "heads": 7}}, "a multiple of heads"),
        ({"shape": [10**9, 8, 8]}, "shape.0: Input should be less than or equal to 65536"),
        ({"classes": 10**9}, "classes: Input should be less than or equal to 1000000"),
        ({"classes": 3.5}, "classes: Input should be a valid integer"),
        ({"shift": float("nan")}, "shift: Input should be a finite number"),
        ({"boundaries": [0.5] * 17}, "boundaries: Tuple should have at most 16 items"),
        ({"few_step": {"times": [], "rule": "renoise"}}, "few_step.times: Tuple should have at least 1 item"),
        ({"few_step": {"times": [0.5, 1.0], "rule": "renoise"}}, "few_step.times: Value error, times must decrease"),
        ({"few_step": {"times": [1.0, 0.0], "rule": "renoise"}}, "few_step.times: Value error, times must decrease"),
        ({"few_step": {"times": [float("inf")], "rule": "renoise"}}, "few_step.times.0: Input should be a finite"),
    ],
)
def test_a_model_config_with_absurd_sizes_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tiny_teacher(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert message in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_a_classifier_with_absurd_widths_is_refused(tmp_path: Path) -> None:
    config = {"name": "x", "shape": [1, 8, 8], "classes": 10, "widths": [8, 8, 8, 10**6], "dimension": 8}
    (tmp_path / "classifier.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"classifier\.json is not a readable .*widths\.3: Input should be less than"):
        load_classifier(tmp_path)


def test_an_idx_file_expands_no_further_than_its_header_declares(tmp_path: Path) -> None:
    name = IDX_FILES["train"][0]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 2, 2, 2) + bytes(1 << 26), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name}\.gz is not a readable idx file \(its header does not match"):
        read_idx(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, *[2**32 - 1] * 3)))
    with pytest.raises(UserError, match=r"no array of 1 to 8,589,934,592 bytes"):
        read_idx(tmp_path)


def test_a_zip_member_that_would_unpack_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "MAX_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1_000_001))
    with pytest.raises(UserError, match=r"a\.zip: a\.png would unpack to more than 1,000,000 bytes"):
        image_sources.list_images(tmp_path / "a.zip")


def write_npz(file: Path, header: bytes) -> None:
    """An array whose header declares what its data is not."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_npz_file_that_is_damaged_or_declares_a_huge_array_is_refused(tmp_path: Path, damaged: bool) -> None:
    file = tmp_path / "a.npz"
    write_npz(file, b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 64, 64, 3), }")
    if damaged:
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
    reason = "Bad CRC-32" if damaged else ""
    with pytest.raises(UserError, match=rf"a\.npz is not a readable folder or archive of images \({reason}"):
        image_sources.list_images(file)


def test_an_image_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 1e6
    with pytest.raises(UserError, match=r"a\.png is not a readable image \(Image size .* exceeds limit"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"labels": torch.tensor(3), "x0": torch.zeros(1, 2)}, "must contain labels and samples"),
        ({"labels": torch.zeros(2), "x0": torch.tensor(3.0)}, "must contain labels and samples"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "must contain labels and samples"),
        ({"labels": torch.zeros(0, dtype=torch.int64), "x0": torch.zeros(0, 2)}, "at least one sample"),
        ({"labels": torch.zeros(2), "x0": torch.zeros(2, 3)}, "labels that are integers"),
        ({"labels": torch.tensor([0, 3]), "x0": torch.zeros(2, 3)}, r"labels outside 0\.\.2"),
        ({"labels": torch.tensor([-1, 0]), "x0": torch.zeros(2, 3)}, r"labels outside 0\.\.2"),
        ({"labels": torch.tensor([0]), "x0": torch.tensor([[np.nan]])}, "finite, real samples"),
        ({"labels": torch.tensor([0]), "x0": torch.tensor([[1j]])}, "finite, real samples"),
    ],
)
def test_stored_samples_of_wrong_shapes_types_or_values_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors .*{message}"):
        read_stored(tmp_path / "a.safetensors", 3)
