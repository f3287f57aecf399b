"""Plausible mistakes with references and rewards of one's own images end before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import tiny_teacher, write_idx

from fewstep.api.data import make_ode_pairs, make_preferences
from fewstep.api.evaluate import win_rates
from fewstep.api.reference import make_reference
from fewstep.core.errors import UserError
from fewstep.core.image_data import ImageData, open_images
from fewstep.core.image_rows import Columns
from fewstep.eval.build_reference import choose_network, held_out
from fewstep.eval.networks.classifier import Classifier
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.references import read_reference
from fewstep.eval.rewards.confidence import confidence

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
LABELS = np.arange(60) % 2


def arrays(folder: Path, **named: np.ndarray) -> ImageData:
    np.savez(folder / "a.npz", **named)
    return ImageData("npz", str(folder / "a.npz"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS, LABELS * 70_000, r"a\.npz has the label 70000 in labels, .* at most 65,536 classes"),
        (np.zeros((60, 4, 4097), np.uint8), LABELS, "4 x 4097 are too large for a classifier"),
    ],
)
def test_what_a_classifier_cannot_have_is_refused_before_its_training(
    images: np.ndarray, labels: np.ndarray, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make_reference(arrays(tmp_path, images=images, labels=labels), tmp_path / "out", network="classifier")
    assert not (tmp_path / "out").exists()


def test_large_numbers_as_labels_take_no_memory(tmp_path: Path) -> None:
    table = open_images(arrays(tmp_path, images=PIXELS, labels=LABELS * 10**13))
    assert choose_network(table, torch.arange(60)) != "classifier"
    table = open_images(arrays(tmp_path, images=PIXELS, labels=LABELS))
    assert choose_network(table, torch.arange(60)) == "classifier"


@pytest.mark.parametrize("share", [float("nan"), 0.0, 1.0, -1.0])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        held_out(50, share, 0)


def test_seeds_are_those_of_generators(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed must be from 0"):
        make_reference(arrays(tmp_path, images=PIXELS), tmp_path / "out", seed=2**63)


def test_other_arrays_of_one_file_are_other_images(tmp_path: Path) -> None:
    data = arrays(tmp_path, x_train=PIXELS, x_test=PIXELS[:10])
    test = ImageData("npz", data.path, columns=Columns(image="x_test"))
    make_reference(data, tmp_path / "out", test=test, network="random")
    assert read_reference(tmp_path / "out").images["test"] == 10


def test_some_of_the_test_files_are_held_out_where_these_are_given(tmp_path: Path) -> None:
    write_idx(tmp_path, torch.from_numpy(PIXELS), torch.from_numpy(LABELS).byte(), "test")
    data = ImageData("idx", str(tmp_path), split="test")
    make_reference(data, tmp_path / "out", network="random")
    assert read_reference(tmp_path / "out").images["test"] == 12


def test_a_classifier_that_lacks_a_label_is_named() -> None:
    network = ClassifierFeatures("mine", "0", (1, 8, 8), Classifier(classes=2).eval())
    images = torch.from_numpy(PIXELS[:3, None])
    assert confidence(network, images, torch.tensor([0, 1, 0])).shape == (3,)
    with pytest.raises(UserError, match="reference mine has 2 classes, and the model's label is 2"):
        confidence(network, images, torch.tensor([0, 1, 2]))


def test_models_of_other_classes_are_not_compared_by_label(tmp_path: Path) -> None:
    ours, theirs = tiny_teacher(tmp_path / "ours"), tiny_teacher(tmp_path / "theirs")
    for folder, turn in ((ours, 1), (theirs, -1)):
        config = json.loads((folder / "config.json").read_text())
        names = [f"class {k}" for k in range(config["classes"])][::turn]
        (folder / "config.json").write_text(json.dumps(config | {"class_names": names}))
    with pytest.raises(UserError, match=r"The classes of .*theirs are not those of .*ours"):
        win_rates(ours, theirs, n=2, rewards=["symmetry"], device="cpu")


def test_captions_are_not_overwritten_by_what_is_made_of_them(tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a shiny fox on blue\n")
    with pytest.raises(UserError, match="is an input, which the result would overwrite"):
        make_ode_pairs("emoji", captions, n=1, captions=captions, device="cpu")
    with pytest.raises(UserError, match="is an input, which the result would overwrite"):
        make_preferences("emoji", captions, reward="symmetry", n=1, captions=captions, device="cpu")
    assert captions.read_text() == "a shiny fox on blue\n"
