"""Models on disk: saved models are loaded bit for bit, and damage is reported by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.core import files
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors, write_text
from fewstep.models import loading
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import bundled_models, load_model
from fewstep.models.model_config import FewStep, ModelConfig
from fewstep.models.saving import save_model
from fewstep.models.schedules import VPDiscrete, schedule_to_dict

CONFIG = ModelConfig(
    backbone={"name": "unet", "widths": [8, 16], "blocks": [1, 1], "embedding": 8, "heads": 2},
    shape=(1, 8, 8),
    classes=3,
    few_step=FewStep(times=(1.0, 0.5), rule="renoise"),
)


def tiny(config: ModelConfig = CONFIG) -> Denoiser:
    """A denoiser with random weights everywhere (the last layer of a new network is zero)."""
    torch.manual_seed(0)
    denoiser = config.build()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tiny(), CONFIG, tmp_path / "model")
    return tmp_path / "model"


# ---- the round trip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"few_step": None, "prediction": "v", "noise_schedule": schedule_to_dict(VPDiscrete.scaled_linear())},
    ],
    ids=["student", "teacher on a discrete schedule"],
)
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update=changes)
    denoiser = tiny(config)
    save_model(denoiser, config, tmp_path / "a" / "b")
    model = load_model(tmp_path / "a" / "b", feature_layers=("mid.0",))
    assert model.config == ModelConfig.model_validate_json(config.model_dump_json())
    assert model.denoiser.schedule == denoiser.schedule
    assert not model.denoiser.training
    for name, tensor in denoiser.backbone.state_dict().items():
        assert model.denoiser.backbone.state_dict()[name].equal(tensor), name
    x_t, condition = torch.randn(2, 1, 8, 8), Condition.of_labels(torch.tensor([0, 3]), 3)
    prediction = model.denoiser(x_t, 0.6, condition)
    assert prediction.x0.equal(denoiser(x_t, 0.6, condition).x0)
    assert set(prediction.features) == {"mid.0"}


# ---- damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def overwrite(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        tensors = read_tensors(file)
        change(tensors)
        write_tensors(tensors, file)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "not a readable safetensors file"),
        (overwrite(b""), "not a readable safetensors file"),
        (overwrite(b"<html>404</html>"), "not a readable safetensors file"),
        (Path.unlink, "does not exist"),
        (edit(lambda t: t.pop("enter.weight")), r"1 tensors missing \(first: \['enter.weight'\]\), 0 unknown"),
        (edit(lambda t: t.update(other=torch.zeros(1))), r"0 tensors missing .*, 1 unknown \(first: \['other'\]\)"),
        (
            edit(lambda t: t.update({"enter.bias": torch.zeros(5)})),
            r"enter.bias has shape \[5\], the network needs \[8\]",
        ),
    ],
    ids=["truncated", "empty", "garbage", "missing", "tensor missing", "unknown tensor", "wrong shape"],
)
def test_damaged_weights_are_reported_by_file(saved: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_model(saved)
    assert str(saved / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "is not a readable config of a fewstep model .Invalid JSON"),
        (b'{"backbone": {"name": "unet"}', "is not a readable config of a fewstep model .Invalid JSON"),
        (b"\xff\xfe\x00", "config of a fewstep model .Invalid JSON"),
        (b'{"backbone": {"name": "unet"}}', "shape: Field required"),
        (b'{"backbone": {"name": "unet"}, "shape": []}', "shape: Tuple should have at least 1 item"),
        (b'{"backbone": {"name": "unet"}, "shape": [1, 0, 8]}', "shape.1: Input should be greater than or equal to 1"),
        (b'{"backbone": {"name": "unet"}, "shape": [1, 8, 8], "clases": 3}', "clases: Extra inputs are not permitted"),
        (b'{"backbone": {"name": "unt"}, "shape": [1, 8, 8]}', "Unknown backbone 'unt'; did you mean 'unet'"),
        (b'{"backbone": {"name": "unet", "widths": []}, "shape": [1, 8, 8]}', "Cannot build a network"),
        (b'{"backbone": {"name": "unet", "widths": [-8, 8]}, "shape": [1, 8, 8]}', "Cannot build a network"),
        (b'{"backbone": {"name": "unet", "depth": 3}, "shape": [1, 8, 8]}', "unexpected keyword argument 'depth'"),
        (
            b'{"backbone": {"name": "unet"}, "shape": [1, 8, 8], "noise_schedule": {"name": "vp"}}',
            "unknown noise schedule 'vp'",
        ),
    ],
)
def test_an_invalid_config_is_reported_by_file(saved: Path, config: bytes, message: str) -> None:
    (saved / "config.json").write_bytes(config)
    with pytest.raises(UserError, match=message) as caught:
        load_model(saved)
    assert str(saved / "config.json") in str(caught.value)


def test_an_unreadable_config_is_reported_by_file(saved: Path) -> None:
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config.json is not a readable config of a fewstep model .*Is a directory"):
        load_model(saved)


# ---- which model


def test_bundled_models_are_found_by_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUNDLED", saved.parent)
    assert bundled_models() == ["model"]
    assert load_model("model").config == CONFIG
    with pytest.raises(UserError, match=r"No model at 'modle'.*; did you mean 'model'\? \(known: model\)"):
        load_model("modle")


def test_a_missing_folder_of_bundled_models_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUNDLED", tmp_path / "missing")
    assert bundled_models() == []


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"No model at '{tmp_path}': neither a folder with config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="missing/folder"):
        load_model(tmp_path / "missing" / "folder")


def test_a_diffusers_pipeline_is_recognised_by_its_index(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    with pytest.raises(UserError, match="'AudioPipeline' are not supported; supported: FluxPipeline"):
        load_model(tmp_path)


# ---- failed writes


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_leaves_the_old_model_unchanged(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise error

    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match=r"Cannot write .*model.safetensors: .*Free some space"):
        save_model(tiny(), CONFIG, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_text("text", file),
        lambda file: write_tensors({"a": torch.zeros(1)}, file),
        lambda file: save_model(tiny(), CONFIG, file),
    ],
    ids=["text", "tensors", "model"],
)
def test_a_parent_that_is_not_a_folder_is_reported(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"Cannot .*file/below"):
        write(tmp_path / "file" / "below")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "mine")]


def test_a_model_that_is_its_own_base_is_refused(saved: Path) -> None:
    file = saved / "config.json"
    config = json.loads(file.read_text()) | {"base": str(saved)}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is based on itself"):
        load_model(saved)
