"""Families of pipelines from outside the package: registered in Python, or installed as entry points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from tiny_pipelines import stable_diffusion

pytest.importorskip("diffusers")

from own_pipeline import OwnFamily, OwnPipeline

import fewstep
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.models.hub.family import FAMILIES, family_of
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.sd import StableDiffusion
from fewstep.models.loading import load_model
from fewstep.samplers.plan import SamplingConfig


@pytest.fixture(autouse=True)
def registrations() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own")
    stable_diffusion(cls=OwnPipeline).save_pretrained(path)
    return path


def install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, "fewstep.family")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,) if group == "fewstep.family" else ())


def test_a_pipeline_of_ones_own_needs_a_family(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'OwnPipeline' are not supported; supported: FluxPipeline.*own_modules\.md"):
        load_model(folder)


def test_a_registered_family_samples_its_pipeline(folder: Path) -> None:
    fewstep.register("family", "own")(OwnFamily)
    assert family_of("OwnPipeline") is OwnFamily
    assert isinstance(PipelineFolder.open(folder).pipeline(), OwnPipeline)
    images = fewstep.sample(
        load_model(folder, size=(16, 16, 1)), prompts=["a cat"], sampling=SamplingConfig("euler", 1)
    )
    assert images.shape == (1, 3, 16, 16)


def test_an_installed_family_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "own", "own_pipeline:OwnFamily")
    assert "own" in FAMILIES.names()
    assert load_model(folder, size=(16, 16, 1)).config.shape == (4, 8, 8)


def test_one_family_by_two_ways_is_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "own", "own_pipeline:OwnFamily")
    fewstep.register("family", "mine")(OwnFamily)
    assert family_of("OwnPipeline") is OwnFamily


def test_two_families_for_one_pipeline_class_are_refused(saved: Callable[[str], Path]) -> None:
    folder = saved("sd")
    fewstep.register("family", "mine")(type("Mine", (StableDiffusion,), {"pipelines": StableDiffusion.pipelines}))
    with pytest.raises(UserError, match=re.escape("'mine' and 'sd' both support the pipeline class 'StableDiffusion")):
        load_model(folder)


def test_something_that_is_not_a_family_is_refused() -> None:
    fewstep.register("family", "wrong")(dict)
    with pytest.raises(UserError, match="'wrong' is not a subclass of Family"):
        family_of("OwnPipeline")


def test_a_class_that_diffusers_does_not_have_is_named(folder: Path) -> None:
    fewstep.register("family", "own")(type("Own", (StableDiffusion,), {"pipelines": ("OwnPipeline",)}))
    with pytest.raises(UserError, match="needs the class 'OwnPipeline'"):
        PipelineFolder.open(folder).pipeline()
