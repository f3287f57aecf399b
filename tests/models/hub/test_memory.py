"""Saving device memory: quantized bases under adapters, 8-bit optimizer states, networks offloaded to host memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import ADAPTERS, TINY, settings

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder
from fewstep.models.condition import Condition
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.offload import OffloadedModule
from fewstep.models.quantized import Bits, quantize

pytest.importorskip("peft")
Saved = Callable[[str], Path]
CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")


def config(folder: Path, family: str, out: Path, adapters: Any, **changes: Any) -> Any:
    return parse_config(settings(folder, family, out, adapters, **changes), "test")


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "error"), [("int8", 0.03), ("nf4", 0.6)])
@pytest.mark.parametrize("name", list(TINY))
def test_a_quantized_network_computes_nearly_the_same(saved: Saved, name: str, bits: Bits, error: float) -> None:
    folder, tiny = PipelineFolder.open(saved(name)), TINY[name]
    exact, small = folder.denoiser(), folder.denoiser()
    quantize(small.backbone, bits)
    x = torch.randn(2, *folder.family.shape(*tiny.size), generator=torch.Generator().manual_seed(0))
    condition = Condition(tiny.embeddings(2, 1))
    if folder.family.embeds_guidance:
        condition = condition.replace(guidance=torch.ones(2))
    with torch.no_grad():
        a, b = (denoiser(x, 0.5, condition).raw for denoiser in (exact, small))
    assert 0 < (a - b).norm() / a.norm() < error
    layers = [p for p in small.backbone.parameters() if p.dtype in (torch.int8, torch.uint8)]
    assert layers
    assert sum(p.nbytes for p in layers) < 0.3 * sum(p.nbytes for p in exact.backbone.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_adapters_trained_on_a_quantized_base_export_to_the_full_precision_one(
    saved: Saved, bits: Bits, tmp_path: Path
) -> None:
    run = RunFolder.create(config(saved("sd3"), "sd3", tmp_path / "run", ADAPTERS, weights=bits), CPU)
    network = run.trainer.roles.denoiser("teacher").backbone.shared_network
    before = {name: p.clone() for name, p in network.named_parameters() if ".lora_" not in name}
    run.train()
    assert all(torch.equal(dict(network.named_parameters())[name], value) for name, value in before.items())
    tensors = read_tensors(tmp_path / "run" / "student" / "model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert (fewstep.export(tmp_path / "run", ExportFormat.merged, tmp_path / "out") / "config.json").is_file()


def test_a_quantized_base_without_adapters_and_offloading_with_them_are_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be trained; add adapters"):
        config(saved("sd"), "sd", tmp_path, None, weights="int8")
    with pytest.raises(UserError, match="offload is for copies"):
        config(saved("sd"), "sd", tmp_path, ADAPTERS, offload=True)


@needs_bitsandbytes
def test_8_bit_optimizer_states_are_restored_from_a_checkpoint(saved: Saved, tmp_path: Path) -> None:
    raw = settings(saved("sd"), "sd", tmp_path / "whole", None, checkpoint={"every": 1})
    rate = {"lr": 1e-3, "optimizer": "adamw8bit"}
    raw["stages"][0] |= {"steps": 4, "roles": {"student": rate, "fake": rate}}
    whole = RunFolder.create(parse_config(raw, "test"), CPU)
    whole.train()
    moments = whole.trainer.roles["student"].optimizer.state.values()
    assert any(moment["state1"].dtype == torch.uint8 for moment in moments)
    half = RunFolder.create(parse_config(raw | {"out": str(tmp_path / "half")}, "test"), CPU)
    half.trainer.advance(2)
    half.on_checkpoint(half.trainer)
    RunFolder.reopen(tmp_path / "half", CPU).train()
    a, b = (read_tensors(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "half"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_offloading_the_teacher_does_not_change_training(saved: Saved, tmp_path: Path) -> None:
    """Also for an objective that uses its features."""
    stage = {
        "steps": 2, "objective": {"name": "dmd2", "steps": 2, "critic_updates": 1},
        "roles": {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}},
    }  # fmt: skip
    students = []
    for offload in (False, True):
        out = tmp_path / str(offload)
        run = RunFolder.create(config(saved("sd"), "sd", out, None, offload=offload, stages=[stage, stage]), CPU)
        host = next(iter(run.trainer.roles["teacher"].parameters)).data_ptr()
        with torch.no_grad(), run.trainer.roles.resident("teacher") as teacher:
            assert (next(teacher.parameters()).data_ptr() != host) == offload
        run.train()
        students.append(read_tensors(out / "student" / "model.safetensors"))
    assert all(torch.equal(students[0][key], value) for key, value in students[1].items())


def test_an_offloaded_module_is_copied_once_until_it_is_released() -> None:
    network = torch.nn.Linear(3, 2)
    offloaded = OffloadedModule(network, CPU)
    host = network.weight.data_ptr()
    offloaded.fetch()
    fetched = network.weight.data_ptr()
    offloaded.fetch()
    assert network.weight.data_ptr() == fetched != host
    offloaded.release()
    assert network.weight.data_ptr() == host


@pytest.mark.gpu
def test_an_offloaded_teacher_leaves_the_accelerator(saved: Saved, tmp_path: Path) -> None:
    device = torch.device("cuda")
    run = RunFolder.create(config(saved("sd"), "sd", tmp_path / "run", None, offload=True), device)
    run.trainer.advance(2)
    assert all(p.device.type == "cpu" for p in run.trainer.roles["teacher"].parameters)
    assert all(p.device.type == "cuda" for p in run.trainer.roles["student"].parameters)
