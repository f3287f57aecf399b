"""What a score belongs to: contents decide, not paths, in files of scores, in comparisons and in statistics."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import refused
from random_sets import write_images

from fewstep.api.evaluate import evaluate_images
from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.eval.evaluate_protocol import ProtocolEvaluator, write_reference
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol
from fewstep.eval.report.tables import side_by_side
from fewstep.eval.score_files import Score, read_scores, write_scores

pytest.importorskip("efficientnet_lite_pytorch")


class Means:
    """A network whose features are the means of the channels."""

    name, sha256, dimension = "means", "ab", 3

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        return image.float().mean((1, 2))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.clone()


@pytest.fixture(autouse=True)
def cheap_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientNet, "load", lambda *_: Means())


def protocol(reference: object, **settings: object) -> Protocol:
    known = {"name": "own", "reference": str(reference), "metrics": ("fd_efficientnet",), "n": 4}
    return Protocol.model_validate(known | settings)


def scored(images: Path, reference: object, **settings: object) -> Score:
    (score,) = evaluate_images(images, protocol(reference, **settings), device="cpu")
    return score


def comparable(a: Score, b: Score) -> str:
    return side_by_side([a], [b])[1][-1]


def test_a_reference_that_changed_under_its_path_is_not_the_same(tmp_path: Path) -> None:
    images, real = write_images(tmp_path / "images", 4, 1), write_images(tmp_path / "real", 6, 0)
    before = scored(images, real)
    shutil.rmtree(real)
    write_images(real, 6, 2)
    after = scored(images, real)
    assert before.value != after.value
    assert comparable(before, after) == "no: different reference"
    assert comparable(after, scored(images, real)) == "yes"


def test_one_reference_has_many_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelled in another way, moved, or as statistics instead of images."""
    images, real = write_images(tmp_path / "images", 4, 1), write_images(tmp_path / "real", 6, 0)
    before = scored(images, real)
    monkeypatch.chdir(tmp_path)
    ((file,), _) = write_reference(real, protocol("x"), str(tmp_path / "ref.npz"), WeightsLocator())
    shutil.copytree(real, tmp_path / "moved")
    for other in ("./real", "moved", file):
        assert comparable(before, scored(images, other)) == "yes", other


def test_what_else_differs_is_named(tmp_path: Path) -> None:
    images, real = write_images(tmp_path / "images", 4, 1), write_images(tmp_path / "real", 6, 0)
    plain, small = scored(images, real), scored(images, real, size=24)
    assert "different reference, size" in comparable(plain, small), "the reference was prepared in another way, too"
    assert "filter" in comparable(small, scored(images, real, size=24, filter="box"))
    assert comparable(plain, scored(images, real, filter="box")) == "yes", "no image was resized"
    assert comparable(plain, scored(images, real, n=3)) == "no: different n"
    old = plain.model_copy(update={"reference_sha256": None})
    assert comparable(plain, old) == "unknown: contents of reference are not recorded"
    weights = plain.model_copy(update={"features_sha256": "cd"})
    assert comparable(plain, weights) == "no: different network weights"
    left, right = (plain.model_copy(update={"captions_sha256": digest}) for digest in ("1", "2"))
    assert comparable(left, right) == "no: different captions"


def test_statistics_are_used_only_with_the_preparation_they_were_written_with(tmp_path: Path) -> None:
    images, real = write_images(tmp_path / "images", 4, 1), write_images(tmp_path / "real", 6, 0, 64)
    locator, device = WeightsLocator(), pick_device("cpu")
    ((file,), _) = write_reference(real, protocol("x", size=32), str(tmp_path / "ref.npz"), locator, device)
    assert scored(images, file, size=32).value == pytest.approx(scored(images, real, size=32).value)
    for settings in ({"size": 24}, {"size": 32, "filter": "box"}, {}):
        with pytest.raises(UserError, match=r"prepared as 'centred square, 32 pixels, lanczos', but the protocol"):
            scored(images, file, **settings)


def test_statistics_without_the_features_of_images_are_refused_before_any_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kid = replace(METRICS.resolve("kid"), network="efficientnet")
    monkeypatch.setattr(METRICS, "resolve", lambda *_, **__: kid)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="only a mean and a covariance; kid needs the features of every real image"):
        ProtocolEvaluator(protocol(tmp_path / "ref.npz"), WeightsLocator())
    np.savez(tmp_path / "ref.npz", feats=np.random.default_rng(0).standard_normal((4, 3)))
    ProtocolEvaluator(protocol(tmp_path / "ref.npz"), WeightsLocator())


def test_statistics_do_not_overwrite_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "real-means.npz"
    np.savez(source, np.zeros((4, 8, 8, 3), np.uint8))
    before = source.read_bytes()
    with pytest.raises(UserError, match="is an input, which the result would overwrite"):
        write_reference(source, protocol("x"), str(tmp_path / "real-{network}.npz"), WeightsLocator())
    assert source.read_bytes() == before
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(protocol("x").model_dump(mode="json", exclude={"name"})))
    for option in ("--json", "--name"):
        message = refused(capsys, "eval", source, "--protocol", file, "--write-stats", tmp_path / "a.npz", option, "x")
        assert "--write-stats writes statistics and no scores" in message


def test_scores_of_images_in_folders_of_one_name_are_all_kept(tmp_path: Path) -> None:
    real = write_images(tmp_path / "real", 6, 0)
    for k in (1, 2):
        (tmp_path / f"d{k}").mkdir()
        write_images(tmp_path / f"d{k}" / "samples", 4, k)
    file = tmp_path / "all.json"

    def add(source: Path, **settings: object) -> list[Score]:
        evaluate_images(source, protocol(real, **settings), device="cpu", json_file=file)
        return read_scores(file)

    add(tmp_path / "d1" / "samples")
    kept = add(tmp_path / "d2" / "samples")
    assert [score.source for score in kept] == [str(tmp_path / f"d{k}" / "samples") for k in (1, 2)]
    assert kept[0].value != kept[1].value
    assert len(add(tmp_path / "d2" / "samples")) == 2, "the same contents replace their own score"
    assert len(add(tmp_path / "d2" / "samples", size=24)) == 3, "another protocol of the same name"
    shutil.rmtree(tmp_path / "d1" / "samples")
    write_images(tmp_path / "d1" / "samples", 4, 5)
    assert len(add(tmp_path / "d1" / "samples")) == 4, "other images at the same path"


def test_options_of_sampling_are_refused_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file = write_images(tmp_path / "images", 4, 1), tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(protocol(tmp_path / "images").model_dump(mode="json", exclude={"name"})))
    for option, value in (("--steps", 4), ("--nfe", 4), ("--solver", "euler"), ("--guidance", 1), ("--seed", 0)):
        message = refused(capsys, "eval", images, "--protocol", file, option, value)
        assert f"{option}: images on disk are scored as they are" in message


def test_a_path_of_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("no", "no.ZIP", "no.tar.gz"):
        message = refused(capsys, "eval", tmp_path / "deep" / "er" / name, "--protocol", "fashion")
        assert f"{name} does not exist: give a run, " in message


def test_files_without_a_common_setting_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, real = write_images(tmp_path / "images", 4, 1), write_images(tmp_path / "real", 6, 0)
    a = scored(images, real)
    student = a.model_copy(update={"role": "student", "solver": "student", "n": 7})
    for name, several in (
        ("a", [a, a.model_copy(update={"n": 3})]),
        ("b", [student, student.model_copy(update={"n": 9})]),
    ):
        write_scores(several, tmp_path / f"{name}.json")
    assert "no metric in common" in refused(capsys, "compare", tmp_path / "a.json", tmp_path / "b.json")
