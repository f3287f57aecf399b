"""Protocols: those that ship, and settings that contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fewstep.core.errors import UserError
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import bundled_protocols, load_protocol


def write_protocol(folder: Path, **settings: object) -> Path:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({"metrics": ["fd_efficientnet"], "n": 10, **settings}))
    return file


@pytest.mark.parametrize("name", bundled_protocols())
def test_bundled_protocols_are_valid_and_name_missing_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_protocol(name)
    assert settings.uses_bundled_reference or settings.metrics
    if settings.uses_bundled_reference:
        return
    if settings.captions:
        with pytest.raises(UserError, match=r"captions\.txt were not found: give a text file, one caption per line"):
            ProtocolEvaluator(settings, WeightsLocator.from_environment())
        (tmp_path / "captions.txt").write_text("a shoe\n")
        settings = load_protocol(name, captions=str(tmp_path / "captions.txt"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("fewstep.eval.networks.inception.temporary_folder", lambda: tmp_path)
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    with pytest.raises(UserError, match=r"were not found\. Download \S+"):
        ProtocolEvaluator(settings, WeightsLocator.from_environment())


def test_arguments_replace_the_settings_of_the_file(tmp_path: Path) -> None:
    file = write_protocol(tmp_path, reference="real", seeds=[3, 4])
    assert load_protocol(str(file)).seeds == (3, 4)
    changed = load_protocol(str(file), reference="other", n=20, seed=7)
    assert (changed.name, changed.reference, changed.n, changed.seeds) == ("own", "other", 20, (7,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["fidd"]}, "own.yaml: protocol: Unknown metric 'fidd'; did you mean 'fid'"),
        ({"metrics": ["no.such:METRIC"]}, "metric 'no.such:METRIC' cannot be imported"),
        ({"metrics": []}, "metrics or a bundled reference are needed"),
        ({"metrics": ["fid"]}, "fid needs a reference"),
        ({"metrics": ["clip_score"]}, "clip_score needs captions"),
        ({"metrics": ["fid"], "reference": "fashion"}, "determines metrics, captions, size and frames"),
        ({"metrics": [], "reference": "fashion", "size": 28}, "determines metrics, captions, size and frames"),
        ({"metrics": ["fvd"], "reference": "real"}, "fvd is computed from videos and needs frames"),
        ({"metrics": ["fid"], "reference": "real", "frames": 16}, "fid is computed from images; remove frames"),
        ({"metrics": ["fvd"], "reference": "real", "frames": 16, "size": 64}, "remove size"),
        ({"size": -1, "reference": "fashion", "metrics": []}, "own.yaml: size: Input"),
        ({"colour": "red"}, "own.yaml: colour: "),
    ],
)
def test_an_invalid_protocol_is_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_protocol(str(write_protocol(tmp_path, **settings)))
    assert message in str(error.value)


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos.yaml").touch()
    with pytest.raises(UserError, match=r"No protocol '.*photo\.yaml'; did you mean '.*photos\.yaml'"):
        load_protocol(str(tmp_path / "photo.yaml"))
    with pytest.raises(UserError, match="No protocol 'cifar'; did you mean 'cifar10'"):
        load_protocol("cifar")


def test_the_metrics_of_a_protocol_are_resolved_in_their_order(tmp_path: Path) -> None:
    settings = load_protocol(str(write_protocol(tmp_path, reference="real", metrics=["kid", "fid"])))
    assert list(settings.resolved_metrics.items()) == [("kid", METRICS.resolve("kid")), ("fid", METRICS.resolve("fid"))]
