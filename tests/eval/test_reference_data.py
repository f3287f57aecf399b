"""References of unusual sets of images: classes without images, test images that are training images."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from image_sets import COLOURS, parquet, pictures, png

from fewstep.api.reference import make_reference
from fewstep.core.errors import UserError
from fewstep.core.image_data import ImageData
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.references import load_reference, read_reference
from fewstep.models.model_config import ModelConfig


def named_set(folder: Path, names: list[str], n: int = 40) -> ImageData:
    """A Parquet file of ``n`` pictures of each colour, whose labels number ``names``."""
    numbers, images, labels = np.random.default_rng(0), [], []
    for name, colour in COLOURS.items():
        for _ in range(n):
            pixels = np.clip(np.array(colour) + numbers.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8)
            images.append({"bytes": png(pixels), "path": None})
            labels.append(names.index(name))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    file = folder / "set.parquet"
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(str(file))
    return ImageData("dataset", str(file))


@pytest.mark.parametrize("names", [[*COLOURS, "violet", "white"], ["blue", "cyan", "green", "red"]])
def test_a_classifier_has_every_named_class_also_those_without_images(tmp_path: Path, names: list[str]) -> None:
    make_reference(named_set(tmp_path, names), tmp_path / "reference", epochs=1)
    reference = load_reference(str(tmp_path / "reference"))
    assert isinstance(reference.network, ClassifierFeatures), "named classes with enough images get a classifier"
    assert reference.class_names == tuple(names)
    assert reference.network.classes_count == len(names)
    reference.require_fit(ModelConfig(backbone={}, shape=(3, 8, 8), classes=len(names), class_names=tuple(names)))


@pytest.mark.parametrize(("images", "test"), [("photos", "photos/red"), ("photos/red", "photos"), ("table", "photos")])
def test_test_images_that_are_training_images_are_refused(tmp_path: Path, images: str, test: str) -> None:
    pictures(tmp_path / "photos", 4)
    table = tmp_path / "table.csv"
    table.write_text("image\nphotos/red/red_0.png\nphotos/red/red_1.png\n")
    given = str(table) if images == "table" else str(tmp_path / images)
    with pytest.raises(UserError, match=r"red_\d.png is one of the images and one of the test images"):
        make_reference(given, tmp_path / "reference", test=tmp_path / test, network="random")
    assert not (tmp_path / "reference").exists()


def test_tables_in_one_folder_that_share_no_image_are_two_sets(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 4)
    for name in ("blue", "red"):
        rows = "".join(f"photos/{name}/{name}_{k}.png\n" for k in range(4))
        (tmp_path / f"{name}.csv").write_text(f"image\n{rows}")
    make_reference(tmp_path / "red.csv", tmp_path / "reference", test=tmp_path / "blue.csv", network="random")
    assert len(load_reference(str(tmp_path / "reference")).features) == 4


def test_a_file_inside_a_folder_of_tables_is_no_other_set(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    file = parquet(tmp_path / "set").path
    with pytest.raises(UserError, match=r"lies inside .*set.* move it out"):
        make_reference(tmp_path / "set", tmp_path / "reference", test=file, network="random")


def test_an_image_with_several_rows_is_not_held_out_and_learned_from(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 10, classes=False)
    files = sorted(file.name for file in (tmp_path / "photos").iterdir())
    rows = "".join(f"photos/{name},caption {k}\n" for name in files for k in range(5))
    (tmp_path / "table.csv").write_text(f"image,caption\n{rows}")
    make_reference(tmp_path / "table.csv", tmp_path / "reference", share=0.5, network="random")
    made = read_reference(tmp_path / "reference").images
    assert (made["train"], made["test"]) == (15, 15), "of 30 files, each counts once"


def test_a_reference_is_not_written_into_the_folder_of_its_images(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 4)
    with pytest.raises(UserError, match=r"is inside .*photos, of which each subfolder is a class"):
        make_reference(photos, photos / "reference", network="random")
    assert sorted(place.name for place in photos.iterdir()) == ["blue", "green", "red"]
