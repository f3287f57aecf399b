"""``benchmarks/gpu.py`` on the CPU: every part with tiny sizes, and what becomes of parts that fail."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import gpu_adapters
import gpu_checks
import pytest
import torch

from fewstep.core.environment import environment
from fewstep.distill.roles import Role
from fewstep.models.compilation import compile_blocks

CPU = torch.device("cpu")


def results(part: str) -> dict[str, dict[str, Any]]:
    """The results of a part's cases, none of which has an error."""
    where = gpu.PLAN if part == "plan" else gpu.PARTS[part]
    cases = getattr(importlib.import_module(where.module), where.function)("cpu", True)
    found = {name: gpu.outcome(work) for name, work in cases.items()}
    assert found
    assert not {name: one["error"] for name, one in found.items() if "error" in one}
    return found


def test_facts() -> None:
    (machine,) = results("facts").values()
    assert machine["torch"] == torch.__version__
    assert machine["versions"] == environment(CPU)["versions"]


def test_step() -> None:
    found = results("step")
    assert set(found) == {f"{demo}, {kind}" for demo in ("fashion", "emoji") for kind in ("bfloat16", "float32")}
    assert all(one["seconds_full"] > 0 < one["ratio"] and one["graphs"] == 0 for one in found.values())


def test_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.distill.trainer.compile_blocks", partial(compile_blocks, backend="eager"))
    torch._dynamo.reset()
    (one,) = results("compile").values()
    torch._dynamo.reset()
    assert one["graphs"] > 0 < one["ratio"]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_adapters_of_random_networks(name: str) -> None:
    pytest.importorskip("peft")
    training = results(name)["training"]
    assert training["finite"]
    assert len(training["seconds_per_step"]) == gpu_adapters.STEPS
    assert training["peak_bytes"] > 4 * training["parameters"] > 0
    assert training["metrics"]["grad_norm/student"] > 0 < training["metrics"]["grad_norm/fake"]
    planned = gpu_adapters.plan(name, "cpu", True)
    assert planned["planned_bytes"] > planned["resident_bytes"] > 2 * training["parameters"], "the base is bfloat16"


def test_the_adapters_run_is_the_shipped_one_but_for_its_length() -> None:
    for name, (file, *_) in gpu_adapters.CONFIGS.items():
        shipped = gpu_adapters.load_config(gpu_adapters.ROOT / file)
        with gpu_adapters.config_of(name, "cpu", False) as config:
            same = ("teacher", "size", "weights", "precision", "adapters", "gradient_checkpointing", "batch")
            assert all(getattr(config, key) == getattr(shipped, key) for key in same)
            assert config.stages[0].roles == shipped.stages[0].roles


def test_attention() -> None:
    found = results("attention")
    for name, most in (("tiny, float32", 1e-5), ("tiny, bfloat16", 2e-2)):
        math = found[name]["backends"]["math"]
        assert 0 < math["error"] < most
        assert 0 < math["gradient_error"] < most
        assert math["milliseconds"] > 0
    assert "refused" in found["tiny, float32"]["backends"]["cudnn"]


def test_no_step_waits() -> None:
    pytest.importorskip("peft")
    assert [one["waits"] for one in results("waits").values()] == [0, 0]


def test_a_wait_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Role.step

    def waiting(self: Role, lost: torch.Tensor | None = None) -> None:
        float(self.parameters[0].detach().sum())
        step(self, lost)

    monkeypatch.setattr(Role, "step", waiting)
    found = gpu_checks.objective_waits("tdm", {"critic_updates": 1}, CPU)
    assert found["waits"] == 2 * found["steps"]
    assert all(place.startswith("item: ") for place in found["where"])


def test_warnings_of_synchronisation_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu_checks.synchronisations() as found:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert sum(found.values()) == 3
    assert len(found) == 1
    assert isinstance(found, Counter)
    assert modes == ["warn", "default"]


def test_the_tests_that_need_a_gpu_are_found() -> None:
    (one,) = results("equality").values()
    assert one.get("passed", 0) + one.get("skipped", 0) >= 10


def test_two_processes_have_the_losses_of_one() -> None:
    (one,) = results("processes").values()
    assert one["difference"] < 1e-4
    assert one["two"].keys() == one["one"].keys() == {"loss/match", "loss/critic"}


def test_sampling() -> None:
    found = results("sampling")
    assert found["samples, 1 steps"]["images_per_second"] > found["scores, 1 steps"]["images_per_second"] > 0
    assert found["scores, 1 steps"]["scores"]["fd_fashion"] > 0
    assert found["solver, 1 steps"]["ratio"] > 0


# --- the driver -------------------------------------------------------------------------------------------------------

FAULTS = """
import os, time

def mixed(device, tiny):
    return {"good": lambda: {"value": 1}, "bad": lambda: 1 / 0, "nan": lambda: {"value": float("nan")},
            "noisy": lambda: print("a library prints") or {"device": device, "tiny": tiny}}

def dies(device, tiny):
    return {"first": lambda: {"value": 2}, "second": lambda: os._exit(3)}

def hangs(device, tiny):
    return {"first": lambda: {"value": 3}, "second": lambda: time.sleep(60)}

def fine(device, tiny):
    return {"training": lambda: {"peak_bytes": 4}}

def planned(device, tiny):
    return {"fine": lambda: {"planned_bytes": 5}}
"""


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_parts.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    parts = {name: gpu.Part("faulty_parts", name, 20) for name in ("mixed", "dies", "fine")}
    parts["hangs"] = gpu.Part("faulty_parts", "hangs", 3)
    monkeypatch.setattr(gpu, "PARTS", parts)
    out = tmp_path / "gpu.json"
    found = gpu.run_all(["mixed", "dies", "hangs", "fine"], out, "cpu", True, 60)
    assert json.loads(out.read_text()) == found
    assert found["mixed"]["good"]["value"] == 1
    assert "ZeroDivisionError" in found["mixed"]["bad"]["error"]
    assert "not JSON compliant" in found["mixed"]["nan"]["error"]
    assert (found["mixed"]["noisy"]["device"], found["mixed"]["noisy"]["tiny"]) == ("cpu", True)
    assert found["dies"]["first"]["value"] == 2
    assert "exit code 3" in found["dies"][gpu.WHOLE]["error"]
    assert found["hangs"]["first"]["value"] == 3
    assert "stopped after 3 seconds" in found["hangs"][gpu.WHOLE]["error"]
    assert found["fine"]["training"]["peak_bytes"] == 4
    failed = ["mixed: bad", "mixed: nan", "dies: the part", "hangs: the part"]
    assert gpu.errors_of(found) == failed
    late = gpu.run_all(["fine"], out, "cpu", True, 0)
    assert "not run" in late["fine"][gpu.WHOLE]["error"]


def test_plans_are_added_to_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_parts.py").write_text(FAULTS.replace('"fine":', '"sdxl":'))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(gpu, "PARTS", {"sdxl": gpu.Part("faulty_parts", "fine", 20)})
    monkeypatch.setattr(gpu, "PLAN", gpu.Part("faulty_parts", "planned", 20))
    found = gpu.run_all(["sdxl"], tmp_path / "gpu.json", "cpu", True, 60)
    assert found["sdxl"]["training"]["planned_over_peak"] == 5 / 4
    assert json.loads((tmp_path / "gpu.json").read_text()) == found


def test_checks_run_at_once_and_measurements_alone() -> None:
    assert gpu.in_batches(["step", "sdxl", "waits", "equality", "sampling", "processes"]) == [
        ["step"], ["sdxl"], ["waits", "equality"], ["sampling"], ["processes"],
    ]  # fmt: skip
    assert all(part.alone for name, part in gpu.PARTS.items() if name not in ("waits", "equality", "processes"))
