"""References of one's own images: which network, what is held out, which reference a model is scored by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused, succeeds
from image_sets import pictures
from PIL import Image
from tiny_pipelines import TINY
from torch import Tensor
from worlds import tiny_config, tiny_teacher

import fewstep
from fewstep.api.reference import make_reference, reference_for, training_reference
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.core.image_data import ImageData, kind_of
from fewstep.distill.config_files import parse_config
from fewstep.eval.build_reference import held_out
from fewstep.eval.evaluate_reference import ReferenceEvaluator
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.features import ClassifierFeatures, extract_features
from fewstep.eval.networks.image_features import ImageFeatures
from fewstep.eval.networks.random_features import RandomFeatures
from fewstep.eval.references import load_reference, real_images
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of labelled pictures, 8 x 8, by a classifier."""
    root = tmp_path_factory.mktemp("labelled")
    data = ImageData("folder", str(pictures(root / "photos", 40)), crop=True)
    values = make_reference(data, root / "colours", size=(8, 8))
    assert set(values) == {"test_accuracy", "fd_colours"}
    assert values["test_accuracy"] > 0.9
    return root / "colours"


def test_labelled_images_get_a_classifier_and_the_names_of_their_classes(labelled: Path) -> None:
    reference = load_reference(str(labelled))
    assert isinstance(reference.network, ClassifierFeatures)
    assert reference.metric == "fd_colours"
    assert reference.class_names == ("blue", "green", "red")
    assert reference.network.shape == (3, 8, 8)
    assert len(reference.features) == 24, "a fifth of 120 is held out"
    trained = load_reference(str(labelled), "train")
    assert (len(trained.features), trained.statistics.count) == (0, 96), "training compares statistics only"
    record = json.loads((labelled / "reference.json").read_text())
    assert record["images"] == {
        "kind": "folder", "name": "photos", "split": "train", "crop": True, "train": 96, "test": 24,
    }  # fmt: skip


def test_a_small_set_has_images_to_look_at(labelled: Path) -> None:
    images, labels = real_images(str(labelled))
    assert images.shape == (96, 3, 8, 8)
    means = torch.stack([images[labels == k].float().mean((0, 2, 3)) for k in range(3)])
    assert means.argmax(1).tolist() == [2, 1, 0], "blue, green, red"


@pytest.mark.parametrize(("seed", "share"), [(0, 0.2), (1, 0.5)])
def test_nothing_is_held_out_and_learned_from(seed: int, share: float) -> None:
    rows, held = held_out(50, share, seed)
    assert len(held) == 50 * share
    assert sorted((*rows.tolist(), *held.tolist())) == list(range(50))
    assert held_out(1_000_000, 0.5, 0)[1].shape == (10_000,)
    with pytest.raises(UserError, match="at least 2"):
        held_out(5, 0.2, seed)


def test_images_without_labels_get_the_network_that_is_asked_for(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 30, classes=False)
    values = make_reference(photos, tmp_path / "random", network="random")
    assert set(values) == {"fd_random"}
    reference = load_reference(str(tmp_path / "random"))
    assert reference.metric == "fd_random"
    with pytest.raises(UserError, match="has no labels of two classes"):
        make_reference(photos, tmp_path / "no", network="classifier")
    with pytest.raises(UserError, match="is no network of references; did you mean 'random'"):
        make_reference(photos, tmp_path / "no", network="rondom")
    with pytest.raises(UserError, match="did you mean 'classifier'"):
        make_reference(photos, tmp_path / "no", network="clasifier")
    with pytest.raises(UserError, match=r"There is no data set at '.*random/photos'\.$"):  # there are no folders
        make_reference(tmp_path / "random" / "photos", tmp_path / "no")
    with pytest.raises(UserError, match="has no classifier"):
        _ = reference.classifier
    assert not (tmp_path / "no").exists()


def test_an_imagenet_network_is_the_default_without_labels(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    photos = pictures(tmp_path / "photos", 3, classes=False)
    assert set(make_reference(photos, tmp_path / "reference")) == {"fd_efficientnet"}


def test_test_images_of_ones_own_are_used(tmp_path: Path) -> None:
    photos, others = pictures(tmp_path / "photos", 10), pictures(tmp_path / "others", 4, seed=1)
    make_reference(photos, tmp_path / "reference", test=others, network="random")
    assert len(load_reference(str(tmp_path / "reference")).features) == 12
    shutil.rmtree(others / "red")
    with pytest.raises(UserError, match="The test images have the classes"):
        make_reference(photos, tmp_path / "other", test=others, network="random")


def test_random_features_are_the_same_everywhere_and_tell_colours_apart() -> None:
    network = RandomFeatures.load()
    again = RandomFeatures.load()
    assert network.sha256 == again.sha256
    numbers = torch.Generator().manual_seed(0)

    def images(level: int) -> Tensor:
        return (torch.randint(0, 50, (400, 3, 8, 8), generator=numbers) + level).to(torch.uint8)

    features = ImageFeatures("random", (3, 8, 8), network)
    first, same, other = (Statistics.of(extract_features(features, images(k))) for k in (0, 0, 60))
    assert features(images(0)).shape == (400, network.dimension)
    assert 20 * frechet_distance(first, same) < frechet_distance(first, other)
    grey = ImageFeatures("random", (1, 8, 8), network)
    some = images(0)[:2, :1]
    assert torch.equal(grey(some), features(some.expand(-1, 3, -1, -1)))


def test_weights_other_than_the_recorded_ones_are_refused(tmp_path: Path) -> None:
    make_reference(pictures(tmp_path / "photos", 4), tmp_path / "reference", network="random")
    file = tmp_path / "reference" / "reference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"network_sha256": "0" * 64}))
    with pytest.raises(UserError, match="other weights"):
        load_reference(str(tmp_path / "reference"))
    file.write_text("{")
    with pytest.raises(UserError, match=r"reference\.json"):
        load_reference(str(tmp_path / "reference"))


def test_the_kind_of_images_is_recognised(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 1)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metadata.csv").write_text("file_name\n")
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    found = {name: kind_of(str(tmp_path / name)) for name in ("photos", "table", "idx", "a.npz", "owner/name")}
    assert found == {"photos": "folder", "table": "dataset", "idx": "idx", "a.npz": "npz", "owner/name": "dataset"}


# --- which reference --------------------------------------------------------------------------------------------------


def test_a_run_is_scored_by_its_own_reference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "config.yaml").write_text("validation: {reference: refs/mine}\n")
    assert reference_for(run) == reference_for(run / "student") == "refs/mine"
    assert reference_for(run, "other") == "other"
    (run / "config.yaml").write_text("teacher: fashion\n")
    assert reference_for(run) == "fashion"
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.yaml").write_text(f"teacher: {run}\n")
    assert reference_for(tmp_path / "second") == "fashion", "that of the run that it distils"
    assert reference_for("fashion-text") == "fashion"
    (run / "config.yaml").write_text(f"teacher: {tmp_path / 'second'}\n")
    with pytest.raises(UserError, match="No reference is known"):
        reference_for(run)


def test_validation_without_a_reference_is_refused_before_training(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path, validation={"every": 4, "n": 20}), "test")
    with pytest.raises(UserError, match=r"validation\.every needs a reference"):
        fewstep.train(config, progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert training_reference(None, "fashion") == "fashion"


def test_classes_that_are_not_those_of_the_reference_are_refused(labelled: Path, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    raw = json.loads((teacher / "config.json").read_text())
    assert raw["shape"] == [1, 8, 8]
    with pytest.raises(UserError, match=r"need uint8 images of shape \[3, 8, 8\]"):
        fewstep.evaluate(teacher, reference=str(labelled), n=20, steps=[1], device="cpu")


# --- what plausible mistakes meet -------------------------------------------------------------------------------------


def test_images_to_hold_out_are_others_and_of_the_same_classes(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 10)
    with pytest.raises(UserError, match="are the images themselves"):
        make_reference(photos, tmp_path / "reference", test=tmp_path / "photos" / ".." / "photos", network="random")
    pixels = np.zeros((6, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "three.npz", images=pixels, labels=np.arange(6) % 3)
    np.savez(tmp_path / "two.npz", images=pixels, labels=np.arange(6) % 2)
    with pytest.raises(UserError, match="have the classes 0, 1, the others 0, 1, 2: both need the same"):
        make_reference(tmp_path / "three.npz", tmp_path / "reference", test=tmp_path / "two.npz", network="random")
    np.savez(tmp_path / "none.npz", images=pixels)
    make_reference(photos, tmp_path / "unlabelled", test=tmp_path / "none.npz", network="random")
    with pytest.raises(UserError, match=r"none\.npz has no labels of two classes for a classifier"):
        make_reference(photos, tmp_path / "reference", test=tmp_path / "none.npz", network="classifier")
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("network", ["classifier", "random"])
def test_images_too_small_for_features_are_refused(network: str, tmp_path: Path) -> None:
    data = ImageData("folder", str(pictures(tmp_path / "photos", 10)), crop=True)
    with pytest.raises(UserError, match="3 x 5 are too small"):
        make_reference(data, tmp_path / "reference", size=(3, 5), network=network)
    make_reference(data, tmp_path / "reference", size=(4, 4), network=network, epochs=1)


def test_few_images_and_mixed_sizes_are_refused_with_what_helps(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 1)
    with pytest.raises(UserError, match="Use more images, another share or images of their own to hold out"):
        make_reference(tmp_path / "photos", tmp_path / "reference")
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "red" / "larger.png")
    with pytest.raises(UserError, match=r"is 16 x 16, but 12 x 12 is needed.*--crop"):
        make_reference(tmp_path / "photos", tmp_path / "reference")


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first image decides size and colour, and the images decide the network: neither may happen in silence."""
    photos = pictures(tmp_path / "photos", 4)
    grey = photos / "blue" / "blue_0.png"
    Image.open(grey).convert("L").save(grey)
    printed = succeeds("data", "reference", photos, "--out", tmp_path / "mine", "--network", "random")
    assert "compares 12 x 12 grey images in features of random: 10 learned from, 2 held out" in printed
    message = refused(capsys, "data", "reference", photos, "--label", "species", "--out", tmp_path / "other")
    assert "--image and --label name columns of a table" in message


def test_a_model_with_other_classes_is_neither_validated_nor_scored(labelled: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        backbone={"name": "unet", "widths": [8], "blocks": [1], "embedding": 8, "heads": 1}, shape=(3, 8, 8), classes=4
    )
    save_model(config.build(), config, tmp_path / "teacher")
    message = r"The model has 4 classes and the reference \S+colours 3"
    with pytest.raises(UserError, match=message):
        fewstep.evaluate(tmp_path / "teacher", reference=str(labelled), n=20, steps=[1], device="cpu")
    raw = tiny_config(tmp_path, validation={"every": 4, "n": 20, "reference": str(labelled)})
    with pytest.raises(UserError, match=message):
        fewstep.train(parse_config(raw, "test"), progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    raw["validation"] = {"every": 4, "n": 20, "reference": "fashion"}
    with pytest.raises(UserError, match=r"^The features 'fashion' need uint8 images of shape \[1, 28, 28\]"):
        fewstep.train(parse_config(raw, "test"), progress=False)


def test_a_pipeline_is_not_scored_by_a_reference_of_other_images(labelled: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=r"colours cannot score this pipeline.*--protocol"):
        fewstep.evaluate("fashion-text", reference=str(labelled), n=1500, steps=[1], device="cpu")


def test_a_pipeline_of_another_size_is_not_scored_by_garments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32-pixel samples can be garments; those of another size were refused after all of them had been generated."""
    pytest.importorskip("diffusers")
    TINY["sd"].build().save_pretrained(tmp_path / "sd")
    model = fewstep.load(tmp_path / "sd", "cpu", size=(64, 64, 1))
    with pytest.raises(UserError, match="The reference fashion cannot score this pipeline"):
        ReferenceEvaluator(load_reference("fashion"), 1500, (0,)).check(model)
    ReferenceEvaluator(load_reference("fashion"), 1500, (0,)).check(fewstep.load("fashion-text", "cpu"))


def test_a_folder_that_is_no_reference_and_a_reference_that_is_no_model_are_named(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"is not a reference: it has no test\.safetensors"):
        load_reference(str(pictures(tmp_path / "photos", 1)))
    for command in (["eval"], ["sample"], ["export", "--out", tmp_path / "out"]):
        assert "is a reference of fewstep data reference, not a model" in refused(capsys, *command, labelled)


def test_a_classifier_of_another_reference_is_refused(labelled: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(labelled, tmp_path / "mixed")
    tensors = read_tensors(mixed / "classifier.safetensors")
    write_tensors({name: tensor + 0 if "head" not in name else tensor + 1 for name, tensor in tensors.items()},
                  mixed / "classifier.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="contains features of classifier with other weights"):
        load_reference(str(mixed))


def test_a_pipeline_of_ones_own_is_not_scored_by_a_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before references belonged to runs, 10,000 samples of any pipeline were scored as garments."""
    pytest.importorskip("diffusers")
    TINY["sd"].build().save_pretrained(tmp_path / "sd")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"teacher: {tmp_path / 'sd'}\nvalidation: {{every: 4}}\n")
    with pytest.raises(UserError, match="No reference is known"):
        reference_for(run)
    assert "No reference is known" in refused(capsys, "eval", tmp_path / "sd")


def test_scores_and_report_of_a_run_are_by_its_reference(labelled: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        backbone={"name": "unet", "widths": [8], "blocks": [1], "embedding": 8, "heads": 1}, shape=(3, 8, 8), classes=3
    )
    save_model(config.build(), config, tmp_path / "teacher")
    raw = tiny_config(tmp_path, validation={"every": 12, "n": 20, "reference": str(labelled)}, health={"every": 0})
    run = fewstep.train(parse_config(raw, "test"), progress=False)
    scores = fewstep.evaluate(run, n=20, steps=[1], device="cpu")
    assert {score.reference for score in scores} == {f"{labelled}/test"}
    page = fewstep.report(run).read_text()
    assert "fd_colours" in page
    assert "fd_fashion" not in page
