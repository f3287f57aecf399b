"""Sets of images: every form gives the same pixels, labels and captions; what is wrong is named by file or row."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import image_sets
import numpy as np
import pytest
import torch
from image_sets import CAPTIONS, CLASSES, FORMS, LABELS, NAMES, PIXELS, class_folders, files, png
from worlds import write_idx

from fewstep.core import image_data
from fewstep.core.errors import UserError
from fewstep.core.image_data import ImageData, ImageTable, open_images
from fewstep.core.image_rows import Columns

EVERY = torch.arange(5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pixels_of(table: ImageTable) -> np.ndarray:
    return table[torch.arange(len(table))][0].permute(0, 2, 3, 1).numpy()


def refused(data: ImageData, shape: tuple[int, ...] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_images(data, shape)
    return str(caught.value)


# --- every form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "decoded when used"])
def test_every_form_gives_the_same_images_labels_and_captions(
    form: str, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(image_data, "IN_MEMORY", 0)
    connections: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: connections.append(where) or [])
    table = open_images(FORMS[form](tmp_path))
    images, labels = table[EVERY]
    assert (table.shape, len(table), images.dtype) == ((3, 4, 6), 5, torch.uint8)
    assert np.array_equal(pixels_of(table), PIXELS)
    assert labels.tolist() == table.labels.tolist() == LABELS
    assert table.labelled
    numbered = form in ("webdataset", "npz of integers, channels first")
    assert table.class_names == (() if numbered else CLASSES)
    assert table.captions == (None if form.startswith("npz") else CAPTIONS)
    assert table[torch.tensor([3, 3])][1].tolist() == [0, 0]
    assert connections == []  # invariant 8: nothing is sent, not even a count of downloads


def test_folders_are_classes_and_a_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    table = open_images(class_folders(tmp_path / "set"))
    assert (table.labels.tolist(), table.class_names) == (sorted(LABELS), CLASSES)
    assert np.array_equal(pixels_of(table), PIXELS[[3, 0, 2, 1, 4]])
    files(tmp_path / "flat")
    (tmp_path / "flat" / ".cache").mkdir()
    flat = open_images(ImageData("folder", str(tmp_path / "flat")))
    assert (flat.labels.tolist(), flat.labelled, flat.class_names) == ([0] * 5, False, ())
    assert np.array_equal(pixels_of(flat), PIXELS)


def test_idx_files_are_images_too(tmp_path: Path) -> None:
    grey = torch.randint(0, 256, (4, 5, 5), dtype=torch.uint8)
    write_idx(tmp_path, grey, torch.arange(4, dtype=torch.uint8), "test")
    table = open_images(ImageData("idx", str(tmp_path), split="test"))
    images, labels = table[torch.arange(4)]
    assert images.equal(grey[:, None])
    assert labels.tolist() == [0, 1, 2, 3]
    colour = open_images(ImageData("idx", str(tmp_path), split="test"), (3, 5, 5))
    assert colour[torch.arange(4)][0].equal(grey[:, None].expand(-1, 3, -1, -1))


def test_a_large_set_decodes_the_rows_that_are_used_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_data, "IN_MEMORY", 5 * 3 * 4 * 6 - 1)
    data = class_folders(tmp_path / "set")
    table = open_images(data, (3, 4, 6))
    assert table.pixels is None
    (tmp_path / "set" / "bee" / "3.png").write_bytes(b"damaged")
    assert table[torch.tensor([1, 4])][0].shape == (2, 3, 4, 6)
    with pytest.raises(UserError, match=r"bee.3\.png is not a readable image"):
        table[torch.tensor([1, 0])]
    monkeypatch.setattr(image_data, "IN_MEMORY", 5 * 3 * 4 * 6)
    assert "bee" in refused(data, (3, 4, 6))  # a small set is decoded when it is opened


# --- labels -----------------------------------------------------------------------------------------------------------


def test_classes_belong_to_those_of_a_model_by_name(tmp_path: Path) -> None:
    table = open_images(class_folders(tmp_path / "set"))
    assert table.labels_of(3).tolist() == sorted(LABELS)
    assert table.labels_of(4, ("dog", "ant", "cat", "bee")).tolist() == [3, 2, 2, 0, 0]
    with pytest.raises(UserError, match=r"has the class 'bee', the model not; did you mean 'bees'"):
        table.labels_of(3, ("bees", "cat", "dog"))
    with pytest.raises(UserError, match=r"has 3 classes \(bee, cat, dog\), the model 10. .*set model.classes=3"):
        table.labels_of(10)


def test_a_label_that_a_model_lacks_is_named_by_row_and_column(tmp_path: Path) -> None:
    table = open_images(image_sets.webdataset(tmp_path))
    assert table.labels_of(3).tolist() == LABELS
    with pytest.raises(UserError, match=r"a\.tar, row 2: its label \(cls\) is 2, .* 0 to 1"):
        table.labels_of(2)


def test_a_set_without_labels_fits_one_class_or_none(tmp_path: Path) -> None:
    files(tmp_path / "flat")
    table = open_images(ImageData("folder", str(tmp_path / "flat")))
    assert table.labels_of(1).tolist() == [0] * 5
    with pytest.raises(UserError, match=r"flat has no labels, and the model has 2 classes.*model\.classes=0"):
        table.labels_of(2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 0, 0], r"row 3: the column label has the label -1"),
        ([0, None, 1, 0, 0], r"row 2: the column label has no label"),
        (["a", "b", "", "a", "a"], r"row 3: the column label has no label"),
        ([0.5, 1.0, 1.0, 1.0, 1.0], r"row 1: the column label has the label 0\.5; labels are all"),
        ([[1], [2], [3], [4], [5]], r"row 1: the column label has the label \[1\]"),
    ],
    ids=["negative", "missing", "empty", "float", "list"],
)
def test_a_wrong_label_is_named_by_row_and_column(labels: list[Any], message: str, tmp_path: Path) -> None:
    images = [png(pixels) for pixels in PIXELS]
    datasets.Dataset.from_dict({"image": images, "label": labels}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=message):
        open_images(ImageData("dataset", str(tmp_path / "a.parquet")))


def test_an_unlabelled_row_of_a_class_label_is_refused(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, -1, 0]}, features=features)
    table.save_to_disk(str(tmp_path / "set"))
    assert (
        "row 4: the column label has the label -1; labels are all texts, or all whole numbers from 0 to 1"
        in refused(ImageData("dataset", str(tmp_path / "set")))
    )


# --- columns and settings ---------------------------------------------------------------------------------------------


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", val_images=PIXELS, val_labels=LABELS)
    data = ImageData("npz", str(tmp_path / "a.npz"))
    message = refused(data)
    assert "has no column called images or x_train" in message
    assert "its columns are val_images, val_labels" in message
    named = open_images(replace(data, columns=Columns(image="val_images", label="val_labels")))
    assert named.labels.tolist() == LABELS
    assert not open_images(replace(data, columns=Columns(image="val_images"))).labelled
    assert "has no column 'vall'; its columns are" in refused(replace(data, columns=Columns(image="vall")))
    np.savez(tmp_path / "a.npz", images=PIXELS, x_train=PIXELS)
    assert "has several columns that may be the image; its columns are images, x_train" in refused(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "folder", "split": "test"}, "split does not act on kind folder"),
        ({"kind": "npz", "split": "test"}, "split does not act on kind npz"),
        ({"kind": "idx", "split": "val"}, "split is train or test for kind idx"),
        ({"kind": "idx", "columns": Columns(image="a")}, "columns does not act on kind idx"),
        ({"kind": "folder", "subset": "a"}, "subset does not act on kind folder"),
        ({"kind": "npz", "columns": Columns(caption="a")}, r"columns\.caption does not act on kind npz"),
        ({"kind": "fodler"}, "'fodler' is no kind of images; did you mean 'folder'"),
    ],
)
def test_a_setting_that_does_not_act_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageData(**{"path": "x", **changes})


# --- damage and hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS.astype(np.float32)}, "images must be uint8 images"),
        ({"images": PIXELS[:, :, :, :2]}, "images have 1, 3 or 4 channels"),
        ({"images": PIXELS[:0]}, "images must be uint8 images"),
        ({"images": PIXELS, "labels": LABELS[:3]}, r"labels has the shape \[3\], but there are 5 images"),
        ({"images": np.array([{}, {}], object)}, "not a readable .npz file"),
        ({"images": PIXELS, "labels": np.array(NAMES, object)}, "not a readable .npz file"),
    ],
    ids=["float", "two channels", "no images", "other length", "pickled images", "pickled labels"],
)
def test_arrays_that_are_no_images_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_images(ImageData("npz", str(tmp_path / "a.npz")))


def test_a_single_array_is_no_npz_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    assert "holds a single array" in refused(ImageData("npz", str(tmp_path / "a.npy")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "is outside"),
        ("/etc/hostname", "is outside"),
        ("none.png", "does not exist"),
        ("notes.txt", "is not one of .png"),
        ("damaged.png", "row 1 is not a readable image"),
        ("https://example.org/a.png", "does not exist"),
    ],
)
def test_a_table_names_readable_images_of_its_folder(name: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(PIXELS[0]))
    (folder / "notes.txt").write_text("x")
    (folder / "damaged.png").write_bytes(png(PIXELS[0])[:60])
    (folder / "a.csv").write_text(f"image\n{name}\n")
    text = refused(ImageData("dataset", str(folder / "a.csv")))
    assert message in text
    assert "a.csv, row 1" in text


def test_a_cell_without_an_image_is_named(tmp_path: Path) -> None:
    columns = {"image": [png(PIXELS[0]), None]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "a.parquet"))
    assert "a.parquet, row 2: the column image has no image" in refused(
        ImageData("dataset", str(tmp_path / "a.parquet"))
    )


def test_no_code_of_a_data_set_runs(tmp_path: Path) -> None:
    folder, witness = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    (folder / "a.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR.")
    assert "is not a readable data set" in refused(ImageData("dataset", str(folder)))
    assert not witness.exists()


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("nobody/nothing", {}, "nobody/nothing is not a readable data set .* Check its name"),
        ("no/such/folder", {}, "There is no data set at 'no/such/folder'"),
        ("splits", {"split": "tset"}, "splits has no split 'tset'; did you mean 'test'"),
        ("a.parquet", {"split": "test"}, "is one file, without splits"),
        ("splits", {"subset": "a"}, "subset is for names on the hub"),
        ("a.txt", {}, "a.txt is none of .csv"),
        ("empty", {}, "empty is not a readable data set"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused(
    path: str, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    image_sets.saved_splits(tmp_path)
    image_sets.parquet(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_images(ImageData("dataset", path, **changes))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No images" in refused(ImageData("folder", str(tmp_path / "none")))
    assert "none.npz does not exist" in refused(ImageData("npz", str(tmp_path / "none.npz")))
    monkeypatch.setattr("fewstep.core.image_datasets.find_spec", lambda name: None)
    assert "pip install 'fewstep[data]'" in refused(ImageData("dataset", str(tmp_path)))


def test_whole_numbers_in_a_csv_file_are_labels(tmp_path: Path) -> None:
    files(tmp_path)
    lines = [f"{k}.png,{label}\n" for k, label in enumerate([2, 0, 10, 1, 0])]
    (tmp_path / "a.csv").write_text("".join(["image,label\n", *lines]))
    table = open_images(ImageData("dataset", str(tmp_path / "a.csv")))
    assert (table.labels.tolist(), table.class_names) == ([2, 0, 10, 1, 0], ())
    (tmp_path / "a.csv").write_text("".join(["image,label\n", *lines[:4], "4.png,x\n"]))
    table = open_images(ImageData("dataset", str(tmp_path / "a.csv")))
    assert table.class_names == ("0", "1", "10", "2", "x")
    (tmp_path / "a.csv").write_text("".join(["image,label\n", *lines[:4], "4.png\n"]))
    assert "a.csv, row 5: the column label has no label" in refused(ImageData("dataset", str(tmp_path / "a.csv")))


FROM_THE_CACHE = """
import shutil, sys
from pathlib import Path

import datasets
import image_sets

from fewstep.core.image_data import ImageData, open_images

folder, cache = Path(sys.argv[1]), Path(datasets.config.HF_DATASETS_CACHE)
datasets.load_dataset("parquet", data_files=image_sets.parquet(folder).path)
(made,) = (file.parent for file in cache.glob("parquet/*/*/*/dataset_info.json"))
there = cache / "owner___name" / "default" / "0.0.0" / "0123456789abcdef"  # as of a data set of the hub
shutil.copytree(made, there)
for file in there.glob("parquet-*.arrow"):
    file.rename(there / file.name.replace("parquet", "name"))
table = open_images(ImageData("dataset", "owner/name"))
print(len(table), *table.class_names, table.decode([0]).flatten()[:3].tolist())
"""


def test_a_name_on_the_hub_is_read_from_the_cache_without_a_connection(tmp_path: Path) -> None:
    where = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    python = {"PYTHONPATH": os.pathsep.join([str(Path(image_sets.__file__).parent), *sys.path])}
    command = [sys.executable, "-c", FROM_THE_CACHE, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | where | python)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[:4] == ["5", "bee", "cat", "dog"]
    assert found.stdout.strip().endswith(str(image_sets.PIXELS[0].transpose(2, 0, 1).ravel()[:3].tolist()))
