"""Preparing a stand-in for torchvision; the real one is imported where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fewstep.core import torchvision_compat
from fewstep.core.errors import UserError
from fewstep.core.torchvision_compat import import_torchvision

# It fails to import like the real one: its kernel needs an operator that only the C extension declares.
STAND_IN = """
import torch
torch.library.Library("torchvision", "IMPL", "Meta").impl("nms", lambda dets, scores, iou_threshold: dets)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "_C.so").write_bytes(b"links to missing libraries")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # so that what the test imports is removed again
    del sys.modules["torchvision"]
    monkeypatch.setattr(torchvision_compat, "_libraries", [])  # its schemas go with it
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    return package


needs_no_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed, its operators are declared"
)


@needs_no_torchvision
def test_missing_operators_are_declared(stand_in: Path) -> None:
    assert import_torchvision().__file__ == str(stand_in / "__init__.py")
    assert import_torchvision() is sys.modules["torchvision"]


@needs_no_torchvision
def test_without_preparation_the_stand_in_fails(stand_in: Path) -> None:
    with pytest.raises(RuntimeError, match="nms"):
        importlib.import_module("torchvision")


@pytest.mark.parametrize("why", ["cuda", "hip", "extension loads"])
def test_a_working_installation_is_not_changed(stand_in: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    (stand_in / "__init__.py").write_text("")
    if why == "extension loads":
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    else:
        monkeypatch.setattr(torch.version, why, "13.0")
    import_torchvision()
    assert not torchvision_compat._libraries


def test_a_missing_torchvision_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fewstep\[eval\]"):
        import_torchvision()


def test_the_real_torchvision_transforms_images() -> None:
    pytest.importorskip("torchvision")  # cured by conftest.py
    transforms = pytest.importorskip("torchvision.transforms")
    assert transforms.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
