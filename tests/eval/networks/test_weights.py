"""Finding weights: in paths, the environment and caches, and the errors if they are missing or wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fewstep.core.errors import UserError
from fewstep.eval.networks import inception
from fewstep.eval.networks.inception import Inception
from fewstep.eval.networks.registry import build_networks
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol

pytest.importorskip("cleanfid")


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.eval.networks.inception.temporary_folder", lambda: tmp_path / "no")
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)


def test_missing_weights_are_named_with_instructions() -> None:
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt were not found\. Download https://\S+ and put it"):
        Inception.load("clean", WeightsLocator.from_environment())


def test_weights_are_found_in_a_folder_in_a_file_and_in_folders_of_the_environment(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder = Inception.load("clean", WeightsLocator.from_environment(inception_weights))
    assert (in_folder.name, in_folder.dimension) == ("inception_clean", 2048)
    in_file = Inception.load("clean", WeightsLocator.from_environment(inception_weights / inception.SCRIPT))
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(inception_weights))
    in_environment = Inception.load("legacy_tensorflow", WeightsLocator.from_environment())
    assert in_folder.sha256 == in_file.sha256 == in_environment.sha256


def test_a_path_of_weights_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        WeightsLocator.from_environment(tmp_path / "missing")


def test_weights_of_another_network_are_refused(inception_weights: Path, tmp_path: Path) -> None:
    shutil.copy(inception_weights / inception.PORT, tmp_path / inception.SCRIPT)
    with pytest.raises(UserError, match=r"does not contain the weights of Inception-V3"):
        Inception.load("clean", WeightsLocator.from_environment(tmp_path))
    shutil.copy(inception_weights / inception.SCRIPT, tmp_path / inception.PORT)
    with pytest.raises(UserError, match=r"does not contain the weights of Inception-V3"):
        Inception.load("legacy_pytorch", WeightsLocator.from_environment(tmp_path))
    (tmp_path / inception.PORT).write_bytes(b"")
    with pytest.raises(UserError, match=r"does not contain the weights of Inception-V3"):
        Inception.load("legacy_pytorch", WeightsLocator.from_environment(tmp_path))


def test_networks_are_built_by_name_and_an_unknown_one_is_refused(inception_weights: Path) -> None:
    protocol = Protocol(name="own", metrics=("fid",), reference="real", inception="legacy_pytorch", n=10)
    locator = WeightsLocator((inception_weights,))
    networks = build_networks(["inception", "inception_classes", "inception"], protocol, locator, "cpu")
    assert {key: network.name for key, network in networks.items()} == {
        "inception": "inception_legacy_pytorch", "inception_classes": "inception_classes",
    }  # fmt: skip
    with pytest.raises(UserError, match="Unknown network 'inceptoin'; did you mean 'inception'"):
        build_networks(["inceptoin"], protocol, locator, "cpu")
