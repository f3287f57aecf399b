"""Training with recorded evaluations is the same; without a GPU by what stands in for it (``computed_again``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CASES, settings

from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.trainer import Trainer

STEPS = 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def losses(raw: dict[str, Any], device: str) -> Iterator[dict[str, float]]:
    config = parse_config(raw, "test")
    trainer = Trainer(config, build_inputs(config, torch.device(device)), torch.device(device))
    for _ in range(STEPS):
        metrics = trainer.one_step().items()
        yield {name: value.item() for name, value in metrics if name.startswith(("loss/", "grad_norm/"))}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("objective", "changes"), CASES)
def test_training_is_the_same(
    objective: str, changes: dict[str, Any], device: str, precision: str, tmp_path: Path, recorded: list[bool]
) -> None:
    raw = settings(objective, tmp_path, device, precision, **changes) | {"accumulate": 2}
    raw["stages"] = [{**raw["stages"][0], "steps": 2 * STEPS}]
    plain = list(losses(raw, device))
    assert not recorded
    rounding = 1e-6 if device == "cpu" else 1e-3 if precision == "float32" else 5e-2
    for ours, theirs in zip(losses(raw | {"cuda_graphs": True}, device), plain, strict=True):
        assert ours == pytest.approx(theirs, rel=rounding, abs=rounding / 10)
    assert recorded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "adapters"),
    [("sd", False), ("sdxl", False), ("pixart", False), ("sd3", True), ("flux", True), ("wan", True)],
)
def test_training_of_pipelines_is_the_same(
    name: str, adapters: bool, device: str, tmp_path: Path, recorded: list[bool]
) -> None:
    pytest.importorskip("peft")
    import tiny_pipelines

    tiny_pipelines.TINY[name].build().save_pretrained(tmp_path / "teacher")
    tiny_pipelines.write_embeddings(name, tmp_path / "teacher")
    lora = tiny_pipelines.ADAPTERS if adapters else None
    raw = tiny_pipelines.settings(tmp_path / "teacher", name, tmp_path / "run", lora)
    raw["stages"] = [{**raw["stages"][0], "steps": 2 * STEPS}]
    plain = list(losses(raw, device))
    for ours, theirs in zip(losses(raw | {"cuda_graphs": True}, device), plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6 if device == "cpu" else 1e-2, abs=1e-4)
    assert recorded


@pytest.mark.parametrize("device", DEVICES)
def test_a_lost_update_is_traced_to_its_layer(device: str, tmp_path: Path, recorded: list[bool]) -> None:
    raw = settings("dmd2", tmp_path, device, "float32", critic_updates=1) | {"cuda_graphs": True, "log_every": 1}
    raw["stages"] = [{**raw["stages"][0], "steps": 2 * STEPS}]
    config = parse_config(raw, "test")
    trainer = Trainer(config, build_inputs(config, torch.device(device)), torch.device(device))
    trainer.advance(STEPS)
    assert recorded
    next(trainer.roles["teacher"].module.parameters()).data.fill_(float("nan"))
    trainer.one_step()
    (lost,) = trainer.loop.lost
    assert re.search("the output of .* in the teacher is not finite for sample 0: its weight", str(lost))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they are recorded")
def test_without_a_gpu_they_are_refused(tmp_path: Path) -> None:
    raw = settings("dmd2", tmp_path, "cpu", "float32") | {"cuda_graphs": True}
    config = parse_config(raw, "test")
    with pytest.raises(UserError, match="cuda_graphs: true needs a GPU, and this run is on cpu"):
        Trainer(config, build_inputs(config, torch.device("cpu")), torch.device("cpu"))


@pytest.mark.parametrize("change", [{"offload": True}, {"shard": True}, {"gradient_checkpointing": True}])
def test_what_saves_memory_excludes_them(change: dict[str, Any], tmp_path: Path) -> None:
    raw = settings("dmd2", tmp_path, "cpu", "float32") | {"cuda_graphs": True}
    with pytest.raises(UserError, match=f"to save time, and {next(iter(change))} the reverse"):
        parse_config(raw | change, "test")
