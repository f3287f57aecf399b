"""Evaluation by protocols of images and models against real images, with an ImageNet network that pip installs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import refused, succeeds
from random_sets import write_images
from worlds import tiny_teacher

from fewstep.api.evaluate import evaluate, evaluate_images
from fewstep.core.errors import UserError
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.feature_statistics import FeatureStatistics, collect_statistics
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.frechet import Statistics, frechet_distance, frechet_error
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol, load_protocol
from fewstep.eval.report.ranking import direction_of
from fewstep.eval.report.tables import rows
from fewstep.eval.score_files import read_scores
from fewstep.models.loading import load_model

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """12 real and 10 generated images."""
    folder = tmp_path_factory.mktemp("sets")
    return write_images(folder / "real", 12, 0, 24), write_images(folder / "generated", 10, 1, 24)


def write_protocol(folder: Path, **settings: object) -> Path:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({"metrics": ["fd_efficientnet"], "n": 10, **settings}))
    return file


def test_images_are_scored_against_images_and_against_their_statistics(sets: tuple[Path, Path], tmp_path: Path) -> None:
    real, generated = sets
    network = EfficientNet.load()
    a, b = (
        Statistics.of(torch.cat([network(torch.stack(x)) for x in ImageSet.open(folder).batches(network.prepare)]))
        for folder in (real, generated)
    )
    expected = frechet_distance(a, b)
    protocol = write_protocol(tmp_path, reference=str(real))
    printed = succeeds("eval", generated, "--protocol", protocol, "--json", tmp_path / "a.json")
    assert "10 random real samples would score about" in " ".join(printed.split()), "the bias of few images is noted"
    (score,) = read_scores(tmp_path / "a.json")
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert (score.metric, score.role, score.n, score.protocol) == ("fd_efficientnet", "images", 10, "own")
    assert score.manifest is not None
    assert score.manifest["networks"] == {"efficientnet_lite0": network.sha256}
    assert score.manifest["reference"] == {"efficientnet": 12}

    stats = tmp_path / "{0}-{network}.npz"  # other braces in a path are kept
    printed = succeeds("eval", real, "--protocol", protocol, "--write-stats", stats)
    assert "{0}-efficientnet_lite0.npz" in printed.replace("\n", "")
    succeeds("eval", generated, "--protocol", protocol, "--reference", stats, "--json", tmp_path / "b.json")
    assert read_scores(tmp_path / "b.json")[0].value == pytest.approx(expected, rel=1e-6)
    printed = succeeds("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "+0.000" in printed or "-0.000" in printed
    assert "yes" in printed, "statistics of the same images are the same reference"


@pytest.mark.parametrize(("scored", "real"), [("all", "all/real"), ("all/new", "all"), ("link", "all")])
def test_images_of_which_some_are_the_references_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scored: str, real: str
) -> None:
    for seed, name in enumerate(("real", "new")):
        (tmp_path / "all").mkdir(exist_ok=True)
        write_images(tmp_path / "all" / name, 3, seed, 24)
    (tmp_path / "link").symlink_to(tmp_path / "all" / "new")
    protocol = write_protocol(tmp_path, reference=str(tmp_path / real), n=3)
    message = refused(capsys, "eval", tmp_path / scored, "--protocol", protocol)
    assert "contains the other, so that some of the images to score are real ones" in message


def test_the_distance_of_images_from_themselves_is_zero(sets: tuple[Path, Path], tmp_path: Path) -> None:
    real, _ = sets
    (score,) = evaluate_images(real, load_protocol(str(write_protocol(tmp_path, reference=str(real), n=12))))
    assert score.value == pytest.approx(0, abs=1e-3)


def test_a_model_is_scored_in_parts_for_each_seed_of_the_protocol(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    protocol = load_protocol(str(write_protocol(tmp_path, reference=str(sets[0]), n=14, seeds=[3, 4])))
    one_part = evaluate(teacher, protocol=protocol, steps=[2], device="cpu")
    assert [(score.seed, score.nfe, score.n) for score in one_part] == [(3, 2, 14), (4, 2, 14)]
    assert one_part[0].value != one_part[1].value
    monkeypatch.setattr("fewstep.samplers.generate.PART", 4)
    parts = evaluate(teacher, protocol=protocol, steps=[2], device="cpu")
    assert [score.value for score in parts] == pytest.approx([score.value for score in one_part], rel=1e-4)


def test_the_error_bar_of_a_models_images_is_that_of_its_classes_in_turn(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    classes = load_model(str(teacher)).config.classes
    found: list[FeatureStatistics] = []
    strata: list[int] = []

    def collect(*arguments: Any, **settings: Any) -> dict[str, FeatureStatistics]:
        collected = collect_statistics(*arguments, **settings)
        found.extend(collected.values())
        strata.append(settings.get("strata", 0))
        return collected

    n = 10 * classes
    protocol = load_protocol(str(write_protocol(tmp_path, reference=str(sets[0]), n=n, metrics=["fd_efficientnet"])))
    reference = ProtocolEvaluator(protocol, WeightsLocator())._reference["efficientnet"].statistics
    monkeypatch.setattr("fewstep.eval.evaluate_protocol.collect_statistics", collect)
    (score,) = evaluate(teacher, protocol=protocol, steps=[1], device="cpu", json_file=tmp_path / "a.json")
    of_images = found[-1]
    assert strata[-1] == classes
    assert [group.count for group in of_images.groups] == [classes] * 10, "one image of each class"
    assert score.error == pytest.approx(frechet_error(of_images.groups, reference))
    assert score.error_of == "standard error over samples (jackknife, 10 groups)"
    assert json.loads((tmp_path / "a.json").read_text())[0]["error"] == score.error
    assert f"± {score.error:.3f}" in rows([score])[1][4]


def test_too_few_images_for_a_metric_are_refused_before_anything_is_computed(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With metrics of Inception and CLIP, computed here by an installed network."""
    real, generated = sets
    teacher = tiny_teacher(tmp_path / "teacher")
    monkeypatch.setattr(
        "fewstep.eval.evaluate_protocol.build_networks",
        lambda names, *_: {name: EfficientNet.load() for name in names},
    )

    def refusal(metric: str, n: int) -> tuple[str, str]:
        protocol = Protocol(name="own", reference=str(real), metrics=(metric,), n=n)
        messages = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fewstep.samplers.generate.generate", "fewstep.eval.images._decode"):
                patch.setattr(name, lambda *_, **__: pytest.fail("it was computed"))
            patch.setattr(
                "fewstep.eval.evaluate_protocol.ProtocolEvaluator._read_reference", lambda *_: {}
            )  # of 12 images, which is computed when the evaluator is created
            for call in (
                lambda: evaluate(teacher, protocol=protocol, steps=[1], device="cpu"),
                lambda: evaluate_images(generated, protocol, device="cpu"),
            ):
                with pytest.raises(UserError) as error:
                    call()
                messages.append(str(error.value))
        return messages[0], messages[1]

    for metric, n, minimum in (("precision", 3, 4), ("coverage", 5, 6), ("inception_score", 9, 10)):
        assert refusal(metric, n) == (f"{metric} needs at least {minimum} images, got {n}.",) * 2
    of_model, of_images = refusal("diversity", 19)
    assert of_model == "diversity needs at least 20 images, 2 of each class or caption, got 19."
    assert of_images == "diversity needs captions or classes: it compares the images of each of them."


def test_a_metric_of_the_users_own_is_computed_and_its_direction_recorded(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_norm.py").write_text(
        "from fewstep.eval.metrics.metric import Metric\n"
        "NORM = Metric('norm', 'efficientnet', 'lower', 2, lambda i: float(i.images.features().norm(dim=1).mean()),\n"
        "              needs_features=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    protocol = load_protocol(str(write_protocol(tmp_path, metrics=["my_norm:NORM"])))
    (score,) = evaluate_images(sets[1], protocol, json_file=tmp_path / "a.json", device="cpu")
    network = EfficientNet.load()
    (batch,) = ImageSet.open(sets[1]).batches(network.prepare)
    assert score.value == pytest.approx(network(torch.stack(batch)).norm(dim=1).mean().item(), rel=1e-5)
    assert score.metric == "my_norm:NORM"
    assert direction_of(read_scores(tmp_path / "a.json")[0]) == "lower"


def test_invalid_requests_are_refused(
    sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, generated = sets
    statistics = refused(capsys, "eval", generated, "--protocol", "fashion", "--write-stats", tmp_path / "a.npz")
    assert "compares with statistics" in statistics
    protocol = write_protocol(tmp_path, reference=str(tmp_path / "no"))
    message = refused(capsys, "eval", generated, "--protocol", protocol)
    assert "was not found: give real images, or an .npz" in message
    protocol = write_protocol(tmp_path, reference=str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", mu=np.zeros(7), sigma=np.eye(7))
    assert "7 features, efficientnet_lite0 has 1280" in refused(capsys, "eval", generated, "--protocol", protocol)
    teacher = tiny_teacher(tmp_path / "teacher")
    (tmp_path / "captions.txt").write_text("a shoe\n")
    protocol = write_protocol(tmp_path, reference=str(real), captions=str(tmp_path / "captions.txt"))
    assert "has captions; this model takes class labels" in refused(capsys, "eval", teacher, "--protocol", protocol)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    (tmp_path / "bad" / "b.png").write_bytes(b"no")
    protocol = write_protocol(tmp_path, reference=str(real))
    assert "a.png cannot be scored" in refused(capsys, "eval", tmp_path / "bad", "--protocol", protocol, "--n", 2)


def test_scores_of_one_protocol_are_comparable(sets: tuple[Path, Path], tmp_path: Path) -> None:
    protocol = Protocol(name="own", reference=str(sets[0]), metrics=("fd_efficientnet",), n=10)
    evaluate_images(sets[1], protocol, json_file=tmp_path / "a.json", device="cpu")
    evaluate_images(sets[0], protocol, json_file=tmp_path / "b.json", device="cpu")
    assert json.loads((tmp_path / "b.json").read_text())[0]["value"] > 0, "10 of the 12 images are scored"
    assert "yes" in succeeds("compare", tmp_path / "a.json", tmp_path / "b.json")
