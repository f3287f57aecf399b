"""``fewstep doctor``: what it reports is what it found."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from commands import succeeds
from packaging.requirements import Requirement

from fewstep.api import doctor
from fewstep.cli.doctor import sections
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.networks.inception import SCRIPT
from fewstep.eval.networks.weights import VARIABLE
from fewstep.eval.protocol import Protocol
from fewstep.models.loading import bundled_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """The report of the real command, which must import neither diffusers nor transformers."""
    code = """
import sys
from fewstep.cli.main import main
sys.argv = ["fewstep", "doctor", "--json", "-"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_the_report_has_every_part(found: dict) -> None:
    assert found["versions"]["torch"] == torch.__version__
    assert found["bundled"] == bundled_models() == ["emoji", "emoji-video", "fashion", "fashion-text"]
    assert 0 < found["cpu"]["free"] <= found["cpu"]["memory"]
    assert found["folders"]["working folder"]["free"] > 0
    cpu = next(each for each in found["devices"] if each["device"] == "cpu")
    assert cpu["works"]
    assert {"sdpa", "math"} <= set(cpu["attention"])
    assert "cudnn" not in cpu["attention"]
    assert "training and sampling on cpu" in found["usable"]
    assert set(found["weights"]) == set(doctor.WEIGHTS)
    assert all(bool(each["file"]) != bool(each["missing"]) for each in found["weights"].values())


def test_the_text_ends_with_what_is_usable(found: dict) -> None:
    text = succeeds("doctor")
    assert text.index("Versions") < text.index("Devices") < text.index("Usable") < text.index("Not usable")
    lines = sections(found | {"missing": []})
    assert lines["Not usable"] == ["nothing: all extras and weights are here"]


def test_an_extra_is_installed_if_all_its_packages_are_here_and_new_enough() -> None:
    here = metadata.version("numpy")
    assert doctor.extra([Requirement("numpy>=1")]) == {"installed": True, "packages": {"numpy": here}}
    for missing in ("numpy>=9999", "no-such-package"):
        result = doctor.extra([Requirement("numpy>=1"), Requirement(missing)])
        assert not result["installed"]
        assert result["packages"][Requirement(missing).name] is None


def test_the_extras_are_those_of_the_installation_on_this_system(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["core>=1", 'a>=2; extra == "x"', 'b; sys_platform == "nowhere" and extra == "x"', 'c; extra == "y"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    message = metadata.metadata("fewstep")
    del message["Provides-Extra"]
    for name in ("x", "y"):
        message["Provides-Extra"] = name
    monkeypatch.setattr(metadata, "metadata", lambda name: message)
    found = doctor.requirements_of_extras()
    assert {name: [each.name for each in extra] for name, extra in found.items()} == {"x": ["a"], "y": ["c"]}


def test_every_extra_for_users_is_explained_here_and_in_the_documentation() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    users = set(project["optional-dependencies"]) - {"dev", "mutants"}
    assert users == set(doctor.USES)
    for page in ("README.md", "docs/getting_started.md"):
        assert [name for name in users if f"`{name}`" not in (ROOT / page).read_text()] == []


def test_a_missing_extra_is_named_with_its_command() -> None:
    extras = {"video": {"installed": False, "packages": {"av": None}}, "lora": {"installed": True, "packages": {}}}
    usable, missing = doctor.conclusions([], extras, {})
    assert missing == ["reading and writing MP4: pip install 'fewstep[video]'"]
    assert doctor.USES["lora"] in usable


def test_weights_are_found_where_eval_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(doctor, "WEIGHTS", {name: doctor.WEIGHTS[name] for name in ("Inception-V3", "I3D")})
    (tmp_path / SCRIPT).touch()
    found = doctor.metric_weights()
    assert found["Inception-V3"] == {"file": str(tmp_path / SCRIPT), "missing": None}
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # clean-fid's cache
    assert doctor.metric_weights()["Inception-V3"] == found["Inception-V3"]
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert "I3D" in found
    assert "were not found. Download http" in str(found["I3D"]["missing"])
    _, missing = doctor.conclusions([], {}, found)
    assert missing[0].startswith("metrics with the weights of I3D:")
    assert doctor.folders()[f"{VARIABLE} 1"] == {"path": str(tmp_path), "exists": True}


def test_the_weights_of_clip_are_those_that_open_clip_takes() -> None:
    import_torchvision()
    open_clip = pytest.importorskip("open_clip")
    assert Protocol.model_fields["clip"].default in doctor.CLIP
    for name, repository in doctor.CLIP.items():
        model, _, tag = name.partition(":")
        assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"] == f"{repository}/"


def test_attention_backends_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "runs",
        lambda backend, device, precision: (backend, device.type, precision) == ("flex", "cpu", torch.float32),
    )  # fmt: skip
    assert doctor.device("cpu")["attention"] == ["flex"]


def test_a_device_that_fails_is_reported_and_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the driver is too old\nsecond line")

    monkeypatch.setattr(torch, "ones", fails)
    device = doctor.device("cpu")
    assert device["error"] == "the driver is too old"
    usable, missing = doctor.conclusions([device], {}, {})
    assert missing == ["cpu does not compute: the driver is too old"]
    assert not any("cpu" in text for text in usable)
    assert "does not compute: the driver is too old" in "".join(
        sections({**doctor.doctor(), "devices": [device]})["Devices"]
    )
