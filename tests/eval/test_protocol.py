"""``fewstep eval`` by protocols: images and models against real images, with an ImageNet network that is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from test_cli import fewstep, refused
from worlds import tiny_teacher

from fewstep.core.errors import UserError
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import METRICS, Protocol, load_protocol, protocols
from fewstep.eval.references import real_images
from fewstep.eval.score_files import read_scores

pytest.importorskip("efficientnet_lite_pytorch")


def pictures(folder: Path, n: int, seed: int, size: int = 24) -> Path:
    folder.mkdir()
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    for k, image in enumerate(F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).mul(255).byte()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("sets")
    return pictures(place / "real", 12, 0), pictures(place / "generated", 10, 1)


def protocol(folder: Path, **settings: object) -> Path:
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
    own = protocol(tmp_path, reference=str(real))
    done = fewstep("eval", generated, "--protocol", own, "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    (score,) = read_scores(tmp_path / "a.json")
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert (score.metric, score.role, score.n, score.protocol) == ("fd_efficientnet", "images", 10, "own")
    assert score.manifest is not None
    assert score.manifest["networks"] == {"efficientnet_lite0": network.sha256}
    assert score.manifest["reference"] == {"efficientnet": 12}
    assert "of this about" in done.stdout, "ten images are few, and that is said"

    stats = tmp_path / "real-{network}.npz"
    done = fewstep("eval", real, "--protocol", own, "--write-stats", stats)
    assert done.returncode == 0, done.stderr
    assert "real-efficientnet_lite0.npz" in done.stdout.replace("\n", "")
    done = fewstep("eval", generated, "--protocol", own, "--reference", stats, "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    assert read_scores(tmp_path / "b.json")[0].value == pytest.approx(expected, rel=1e-6)
    done = fewstep("eval", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    assert "+0.000" in done.stdout or "-0.000" in done.stdout
    assert "other reference" in done.stdout


def test_a_model_is_scored_in_parts_over_the_protocols_seeds(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    settings = load_protocol(str(protocol(tmp_path, reference=str(sets[0]), n=14, seeds=[3, 4])))
    whole = measure.evaluate(teacher, protocol=settings, steps=[2], device="cpu")
    assert [(score.seed, score.nfe, score.n) for score in whole] == [(3, 2, 14), (4, 2, 14)]
    assert whole[0].value != whole[1].value
    monkeypatch.setattr("fewstep.samplers.generate.PART", 4)
    parts = measure.evaluate(teacher, protocol=settings, steps=[2], device="cpu")
    assert [score.value for score in parts] == pytest.approx([score.value for score in whole], rel=1e-4)


def test_real_images_of_the_embedded_reference_are_scored_by_it(tmp_path: Path) -> None:
    images, _ = real_images("fashion")
    for k, image in enumerate(images[:200]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k}.png")
    settings = load_protocol("fashion")
    values = {score.metric: score.value for score in measure.evaluate_images(tmp_path, settings, device="cpu")}
    assert set(values) == {"fd_fashion", "kid", "precision", "recall"}
    assert values["precision"] > 0.7


@pytest.mark.parametrize("name", protocols())
def test_protocols_that_ship_are_valid_and_say_which_weights_are_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_protocol(name)
    assert settings.bundled or settings.metrics
    if settings.bundled:
        return
    if settings.captions:
        with pytest.raises(UserError, match=r"captions\.txt are not there: name a text file, one a line"):
            ProtocolEvaluator(settings, WeightsLocator.of())
        (tmp_path / "captions.txt").write_text("a shoe\n")
        settings = load_protocol(name, captions=str(tmp_path / "captions.txt"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("fewstep.eval.networks.inception.temporary", lambda: tmp_path)
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    with pytest.raises(UserError, match=r"are not there\. Fetch \S+"):
        ProtocolEvaluator(settings, WeightsLocator.of())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["fidd"]}, "unknown metric 'fidd'; did you mean 'fid'"),
        ({"metrics": []}, "metrics are needed"),
        ({"metrics": ["fid"]}, "fid needs a reference"),
        ({"metrics": ["clip_score"]}, "clip_score needs captions"),
        ({"metrics": ["fid"], "reference": "fashion"}, "has metrics and conditions of its own"),
        ({"metrics": [], "reference": "fashion", "size": 28}, "has metrics and conditions of its own"),
        ({"metrics": ["fvd"], "reference": "real"}, "fvd is of videos: it needs frames"),
        ({"metrics": ["fid"], "reference": "real", "frames": 16}, "fid is of images: take frames out"),
        ({"metrics": ["fvd"], "reference": "real", "frames": 16, "size": 64}, "take size out"),
        ({"size": -1, "reference": "fashion", "metrics": []}, "own.yaml: size: Input"),
        ({"colour": "red"}, "own.yaml: colour: "),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(
    settings: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = protocol(tmp_path, **settings)
    assert message in refused(capsys, "eval", tmp_path / "images.zip", "--protocol", file)


def test_bad_requests_are_refused(sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, generated = sets
    assert "No protocol 'coco'" in refused(capsys, "eval", generated, "--protocol", "coco")
    assert "Images are scored by a protocol" in refused(capsys, "eval", generated)
    assert "Name what is to be scored" in refused(capsys, "eval")
    assert "belong to a protocol" in refused(capsys, "eval", "fashion", "--captions", "captions.txt")
    statistics = refused(capsys, "eval", generated, "--protocol", "fashion", "--write-stats", tmp_path / "a.npz")
    assert "compares with statistics" in statistics
    own = protocol(tmp_path, reference=str(tmp_path / "no"))
    assert "is not there: name real images, or an .npz" in refused(capsys, "eval", generated, "--protocol", own)
    kid = protocol(tmp_path, reference=str(tmp_path / "x.npz"), metrics=["fd_efficientnet"])
    np.savez(tmp_path / "x.npz", mu=np.zeros(7), sigma=np.eye(7))
    assert "7 features, efficientnet_lite0 has 1280" in refused(capsys, "eval", generated, "--protocol", kid)
    teacher = tiny_teacher(tmp_path / "teacher")
    (tmp_path / "captions.txt").write_text("a shoe\n")
    own = protocol(tmp_path, reference=str(real), captions=str(tmp_path / "captions.txt"))
    assert "has captions; this model takes class labels" in refused(capsys, "eval", teacher, "--protocol", own)
    (generated.parent / "bad").mkdir()
    (generated.parent / "bad" / "a.png").write_bytes(b"no")
    own = protocol(tmp_path, reference=str(real))
    assert "a.png cannot be scored" in refused(capsys, "eval", generated.parent / "bad", "--protocol", own)


def test_a_path_may_have_braces_of_its_own(sets: tuple[Path, Path], tmp_path: Path) -> None:
    stats = tmp_path / "{0}-{network}.npz"
    own = protocol(tmp_path, reference=str(stats))
    assert fewstep("eval", sets[0], "--protocol", own, "--write-stats", stats).returncode == 0
    assert (tmp_path / "{0}-efficientnet_lite0.npz").is_file()
    assert fewstep("eval", sets[1], "--protocol", own).returncode == 0


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert {name for name in METRICS if f"`{name}`" not in text} == set()


def test_scores_of_one_protocol_are_comparable_and_of_two_are_not(sets: tuple[Path, Path], tmp_path: Path) -> None:
    settings = Protocol(name="own", reference=str(sets[0]), metrics=("fd_efficientnet",), n=10)
    measure.evaluate_images(sets[1], settings, json_file=tmp_path / "a.json", device="cpu")
    measure.evaluate_images(sets[0], settings, json_file=tmp_path / "b.json", device="cpu")
    assert json.loads((tmp_path / "b.json").read_text())[0]["value"] > 0, "ten of the twelve"
    done = fewstep("eval", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "yes" in done.stdout
