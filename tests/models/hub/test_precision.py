"""Training in bfloat16: probe and validation compute in the run's precision, with the network's own dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import ADAPTERS, settings
from torch import Tensor

import fewstep
from fewstep.api.models import load
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.family import HubBackbone
from fewstep.models.hub.folder import PipelineFolder

pytest.importorskip("peft")
Saved = Callable[[str], Path]
BF16 = torch.bfloat16


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_a_bfloat16_run_is_probed_and_validated_in_bfloat16(
    saved: Saved, name: str, adapters: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[bool] = []
    forward = HubBackbone.forward

    def recorded(network: HubBackbone, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        evaluated.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == BF16)
        return forward(network, x_t, t, condition)

    monkeypatch.setattr(HubBackbone, "forward", recorded)
    raw = settings(
        saved(name), name, tmp_path / "run", adapters, weights="bfloat16", precision="bfloat16",
        validation={"every": 1, "images": 2},
    )  # fmt: skip
    run = fewstep.train(parse_config(raw, "test"))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["health/sd_ratio"] > 0
    assert len(list((run / "samples").iterdir())) == 2
    assert evaluated
    assert all(evaluated), "some evaluations ran in another precision than the run's"


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
def test_a_saved_student_computes_as_in_its_run(
    saved: Saved, adapters: dict[str, Any] | None, weights: str, tmp_path: Path
) -> None:
    """Bit for bit: in the run's precision, and on a base with weights of the run's type."""
    raw = settings(saved("wan"), "wan", tmp_path / "run", adapters, weights=weights, precision="bfloat16")
    run = RunFolder.create(parse_config(raw, "test"), torch.device("cpu"))
    run.train()
    x = torch.randn(2, *run.trainer.student_config.shape, generator=torch.Generator().manual_seed(0))
    condition = run.trainer.loop.sources["data"](KeyedRandom(0, 0, "test", 0), 2).condition
    with torch.no_grad():
        expected = run.trainer.generator(x, 0.5, condition).raw
        for source in (tmp_path / "run", tmp_path / "run" / "student"):
            assert torch.equal(load(source, "cpu").denoiser(x, 0.5, condition).raw, expected)
        single = load(tmp_path / "run", "cpu", dtype=torch.float32)
        assert {p.dtype for p in single.denoiser.parameters()} == {torch.float32}
    fewstep.export(tmp_path / "run", ExportFormat.merged, tmp_path / "out")  # compared in float32


@pytest.mark.parametrize("name", ["wan", "sd"])
def test_inputs_are_cast_to_the_networks_own_dtype(saved: Saved, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers keeps some parameters in float32, in Wan the first one."""
    folder = PipelineFolder.open(saved(name))
    denoiser = folder.denoiser(BF16)
    backbone = denoiser.backbone
    assert isinstance(backbone, HubBackbone)
    dtypes = {p.dtype for p in backbone.parameters()}
    assert BF16 in dtypes
    assert (torch.float32 in dtypes) == (name == "wan")
    shape = folder.family.shape(32, 32, 9)
    condition = {key: torch.randn(1, *size) for key, size in folder.family.condition_shapes.items()}
    with torch.no_grad():
        out = denoiser(torch.randn(1, *shape), 0.5, Condition(condition))
        exact = folder.denoiser()(out.x_t, 0.5, Condition(condition))
    assert (out.raw - exact.raw).norm() < 0.1 * exact.raw.norm()


def test_an_adapter_is_merged_in_float32_and_cast_to_the_layers_dtype(saved: Saved) -> None:
    from fewstep.models.adapters import share_base

    backbone = PipelineFolder.open(saved("wan")).denoiser(BF16).backbone
    before = {name: p.dtype for name, p in backbone.named_parameters()}
    view = share_base(backbone, rank=2, alpha=2, targets=("to_q",)).fork()
    assert isinstance(view, AdapterView)
    after = {name: p.dtype for name, p in view.merged().named_parameters()}
    assert after == before
