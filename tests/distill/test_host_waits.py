"""No step waits for the device: every objective on the bundled architecture, and the families of pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, MixedDevicesError, PretendDevice, values_of
from tiny_runs import CASES, settings

from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.transfer import like, send
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.trainer import Trainer

STEPS = 6  # enough for every update to be due, and for CDM's trajectories to have several lengths


def trainer(raw: dict[str, Any], device: torch.device) -> Trainer:
    stage = {**raw["stages"][0], "steps": 2 * STEPS}
    config = parse_config({**raw, "stages": [stage], "log_every": 2 * STEPS}, "test")
    return Trainer(config, build_inputs(config, device), device)


def losses(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    each = (trainer.one_step() for _ in range(steps))
    return [{name: values_of(x).item() for name, x in metrics.items() if name[:5] == "loss/"} for metrics in each]


def check_steps(raw: dict[str, Any]) -> None:
    """Trains on the pretend device: no wait after the first steps, and the losses of training on the host."""
    with PretendDevice() as device:
        run = trainer(raw, DEVICE)
        found = losses(run, 1)
        device.waits.clear()
        found += losses(run, STEPS - 1)
    assert not device.waits
    assert device.copies, "times reach the device"
    for ours, host in zip(found, losses(trainer(raw, torch.device("cpu")), STEPS), strict=True):
        assert ours == pytest.approx(host, rel=1e-3, abs=1e-6), "but for the fused optimizer's rounding"


@pytest.mark.parametrize(("objective", "changes"), CASES)
def test_a_step_does_not_wait(objective: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_steps(settings(objective, tmp_path, "cpu", "float32", **changes) | {"accumulate": 2})


def test_a_second_evaluation_of_the_student_does_not_wait(tmp_path: Path) -> None:
    check_steps(settings("dmd2", tmp_path, "cpu", "float32", self_consistency={"substeps": 2}))


def test_students_with_several_step_counts_do_not_wait(tmp_path: Path) -> None:
    raw = settings("tdm", tmp_path, "cpu", "float32", unify=[1, 2, 4])
    for role in raw["stages"][0]["roles"].values():
        role["init"] = "new"
    check_steps(raw)


@pytest.mark.parametrize(
    ("name", "adapters"),
    [("sd", False), ("sdxl", False), ("pixart", False), ("sd3", False), ("flux", False), ("flux", True), ("wan", True)],
)
def test_pipelines_do_not_wait(name: str, adapters: bool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import tiny_pipelines

    tiny_pipelines.TINY[name].build().save_pretrained(tmp_path / "teacher")
    tiny_pipelines.write_embeddings(name, tmp_path / "teacher")
    lora = tiny_pipelines.ADAPTERS if adapters else None
    check_steps(tiny_pipelines.settings(tmp_path / "teacher", name, tmp_path / "run", lora))


def test_pretraining_on_emoji_rendered_on_the_device_does_not_wait(tmp_path: Path) -> None:
    small = {"widths": "[8]", "blocks": "[1]", "patch": 4, "embedding": 8}
    changes = [f"model.backbone.{key}={value}" for key, value in small.items()]
    config = load_config("configs/emoji/teacher.yaml", [*changes, "batch=4", f"out={tmp_path / 'run'}"])
    with PretendDevice():
        batch = build_inputs(config, DEVICE).sources["data"](KeyedRandom(0, 0, "data/data", 0), 4)
        assert batch["x0"].device == DEVICE
    check_steps(config.model_dump(mode="json", exclude_unset=True))


# --- the pretend device itself ----------------------------------------------------------------------------------------


def test_the_pretend_device_counts_waits_and_refuses_to_mix_devices() -> None:
    host = torch.arange(3.0)
    with PretendDevice() as device:
        x = send(host, DEVICE)
        assert not device.waits
        assert [kind for kind, _ in device.copies] == ["copy"]
        for kind, operation in {
            "to device": lambda: host.to(DEVICE), "to host": lambda: x.cpu(), "item": lambda: x.sum().item(),
            "nonzero": lambda: x[x > 0], "index": lambda: x[torch.tensor([0, 1])],
        }.items():  # fmt: skip
            device.waits.clear()
            operation()
            assert [found for found, _ in device.waits] == [kind]
        for mixed in (lambda: x + host, lambda: host.add_(x), lambda: torch.cat([x, host]), lambda: host[x.long()]):
            with pytest.raises(MixedDevicesError):
                mixed()
        assert torch.equal(values_of(x * torch.tensor(2.0)), 2 * host), "a host number may be an operand"


def test_several_values_are_sent_in_one_copy() -> None:
    values = torch.rand(3, 1, dtype=torch.float64), torch.arange(4), torch.tensor(0.1, dtype=torch.float64)
    on_host = like(torch.zeros(1), *values)
    with PretendDevice() as device:
        sent = like(torch.zeros(1, device=DEVICE), *values)
        assert sum(device.copies.values()) == 1
        assert not device.waits
    for ours, host in zip(sent, on_host, strict=True):
        assert torch.equal(values_of(ours), host)
        assert host.dtype == torch.float32
