"""Loading, sampling and exporting hold at most 1.2 times the weights; exports have the type of their base."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.models.adapters import AdapterView
from fewstep.models.hub import export as module
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.weights import weight_files
from fewstep.models.loading import load_model

pytest.importorskip("peft")
BF16, F32 = torch.bfloat16, torch.float32
ROOT = Path(__file__).parents[3]
SMALL = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("loading_memory", ROOT / "benchmarks/loading_memory.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def models(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline ``base`` in bfloat16, in shards, and its students: ``adapter``, and ``copy`` in float32."""
    folder: Path = tmp_path_factory.mktemp("models")
    benchmark.write_models(folder, benchmark.FLUX | SMALL, "10MB")
    assert len(weight_files(folder / "base" / "transformer")) > 3
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}


LIMITS = {  # of the bytes of the base's weights; files that are mapped into memory are not counted
    "load a pipeline in float32": 1.2,
    "load a full student in bfloat16": 1.2,
    "sample the full student": 0.3,
    "export the adapter, merged": 0.6,  # the layers that it changes
    "export the adapter, lora": 0.3,
    "export the full student, merged": 1.2,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_case_holds_a_second_network(benchmark: Any, models: Path) -> None:
    """The other cases are in the benchmark."""
    count = sum(tensor.numel() for tensor in stored(models / "base" / "transformer").values())
    measured = benchmark.measure(models, LIMITS)
    next(measured)
    held = {name: peak / (count * benchmark.CASES[name][1].itemsize) for name, peak, _ in measured}
    assert held["load a pipeline in float32"] > 0.9, "the measurement sees a whole network"
    assert not {name: ratio for name, ratio in held.items() if ratio > LIMITS[name]}


def test_models_have_the_type_in_which_their_weights_are_stored(models: Path) -> None:
    def types(name: str, **options: Any) -> set[torch.dtype]:
        backbone = load_model(models / name, **options).denoiser.backbone
        network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
        return {p.dtype for name, p in network.named_parameters() if ".lora_" not in name}

    assert [types(name) for name in ("base", "adapter", "copy")] == [{BF16}, {BF16}, {F32}]
    for name in ("base", "adapter", "copy"):
        for dtype in (F32, BF16):
            assert types(name, dtype=dtype) == {dtype}


def test_a_full_student_has_the_weights_of_its_file(models: Path) -> None:
    written = read_tensors(models / "copy" / "model.safetensors")
    for dtype in (None, BF16):
        loaded = load_model(models / "copy", dtype=dtype).denoiser.backbone.state_dict()
        assert loaded.keys() == written.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, written[name].to(dtype or F32)), name


@pytest.mark.parametrize("dtype", [None, F32, torch.float16])
@pytest.mark.parametrize("student", ["adapter", "copy"])
def test_exported_weights_are_the_students_in_the_type_of_the_base_or_another(
    models: Path, student: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    base = stored(models / "base" / "transformer")
    trained = read_tensors(models / student / "model.safetensors")
    out = stored(fewstep.export(models / student, ExportFormat.merged, tmp_path / "out", dtype=dtype))
    assert out.keys() == base.keys()
    changed = 0
    for name, tensor in out.items():
        layer = f"network.{name.removesuffix('.weight')}"
        if student == "copy":
            expected = trained[f"network.{name}"]
        elif name.endswith(".weight") and f"{layer}.lora_A.weight" in trained:  # alpha is the rank
            expected = base[name].float() + trained[f"{layer}.lora_B.weight"] @ trained[f"{layer}.lora_A.weight"]
            changed += 1
        else:
            expected = base[name]
        torch.testing.assert_close(tensor, expected.to(dtype or BF16), rtol=0 if student == "copy" else 1e-2, atol=1e-6)
    assert (changed > 0) == (student == "adapter")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_merging_copies_only_the_layers_of_the_adapter_and_changes_no_weight_of_the_base(
    models: Path, dtype: torch.dtype
) -> None:
    view = load_model(models / "adapter", dtype=dtype).denoiser.backbone
    assert isinstance(view, AdapterView)
    before = {name: (p.data_ptr(), p.clone()) for name, p in view.shared_network.named_parameters()}
    merged = dict(view.merged().named_parameters())
    for name, parameter in view.shared_network.named_parameters():
        address, values = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, values)
        if ".lora_" not in name:
            own = merged[name.replace(".base_layer.", ".")]
            assert (own.data_ptr() == address) == (".base_layer.weight" not in name), name


@pytest.mark.parametrize("form", [ExportFormat.lora, ExportFormat.comfyui])
def test_an_adapter_on_a_bfloat16_base_is_compared_factor_by_factor(
    models: Path, form: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor that is wrong by two percent changes outputs by less than the rounding of bfloat16."""
    write: Callable[..., None] = module.write_adapter

    def wrong(tensors: dict[str, Tensor], *arguments: Any) -> None:
        last = max(tensors)
        write({name: 1.02 * x if name == last else x for name, x in tensors.items()}, *arguments)

    assert fewstep.export(models / "adapter", form, tmp_path / "right").is_dir()
    monkeypatch.setattr(module, "write_adapter", wrong)
    with pytest.raises(UserError, match="the adapter differs from the student's in"):
        fewstep.export(models / "adapter", form, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_a_network_that_is_written_wrong_in_bfloat16_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_origin: Callable[[Path], None] = module._remove_origin

    def damage(config: Path) -> None:
        remove_origin(config)
        file = weight_files(config.parent)[0]
        write_tensors({name: 1.02 * x for name, x in read_tensors(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(module, "_remove_origin", damage)
    with pytest.raises(UserError, match="the export differs from the student by"):
        fewstep.export(models / "copy", ExportFormat.merged, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_type_for_an_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="written in float32: leave out dtype"):
        fewstep.export(models / "adapter", ExportFormat.lora, tmp_path / "out", dtype=BF16)
