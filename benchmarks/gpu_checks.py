"""The checks of ``gpu.py``: waits, the tests that need a GPU, several processes. Each returns its cases by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.trainer import Trainer
from fewstep.models.cuda_graphs import EAGER

ROOT = Path(__file__).resolve().parents[1]
Cases = dict[str, Callable[[], dict[str, Any]]]


# --- waits ------------------------------------------------------------------------------------------------------------

STEADY = 5  # steps after the first: enough for every update to be due


def waits(device: str, tiny: bool) -> Cases:
    """How often a steady step waits for the device: 0 is expected. On a CPU, of the pretend device of the tests."""
    from tiny_runs import CASES

    objectives = {
        " ".join([name, *(f"{key}={value}" for key, value in changes.items())]): partial(
            objective_waits, name, changes, torch.device(device)
        )
        for name, changes in CASES
    }
    pipelines = {
        f"{name}, {'adapters' if adapters else 'copies'}": partial(pipeline_waits, name, adapters, torch.device(device))
        for name, adapters in (("sdxl", False), ("flux", True), ("wan", True))
    }
    if tiny:
        return {"tdm": objectives["tdm"], "flux, adapters": pipelines["flux, adapters"]}
    graphed = {"tdm, CUDA graphs": partial(objective_waits, "tdm", {}, torch.device(device), cuda_graphs=True)}
    return objectives | pipelines | (graphed if device == "cuda" else {})


def objective_waits(
    objective: str, changes: dict[str, Any], device: torch.device, **settings_of_run: Any
) -> dict[str, Any]:
    from tiny_runs import settings

    with tempfile.TemporaryDirectory() as folder:
        raw = settings(objective, Path(folder), device.type, "float32", **changes)
        return count_waits(raw | {"accumulate": 2} | settings_of_run, device)


def pipeline_waits(name: str, adapters: bool, device: torch.device) -> dict[str, Any]:
    import tiny_pipelines as tiny

    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        tiny.TINY[name].build().save_pretrained(teacher)
        tiny.write_embeddings(name, teacher)
        raw = tiny.settings(teacher, name, Path(folder) / "run", tiny.ADAPTERS if adapters else None)
        return count_waits(raw | {"precision": "bfloat16"}, device)


def count_waits(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    stage, steps = {**raw["stages"][0], "steps": 2 * STEADY}, 2 * STEADY  # no step reads what an update lost
    config = parse_config({**raw, "stages": [stage], "log_every": steps}, "the benchmark of waits")
    if device.type == "cpu":
        from pretend_device import DEVICE, PretendDevice

        with PretendDevice() as pretend:
            trainer = Trainer(config, build_inputs(config, DEVICE), DEVICE)
            trainer.one_step()
            pretend.waits.clear()
            for _ in range(STEADY):
                trainer.one_step()
            where = {f"{kind}: {line}": count for (kind, line), count in pretend.waits.items()}
    else:
        trainer = Trainer(config, build_inputs(config, device), device)
        for _ in range(1 + EAGER):  # the next one records, with waits
            trainer.one_step()
        with synchronisations() as where:
            for _ in range(STEADY):
                trainer.one_step()
    return {"steps": STEADY, "waits": sum(where.values()), "where": dict(where)}


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Counts the operations for which the host waits for the GPU, by the project's line that caused them."""
    found: Counter[str] = Counter()

    def show(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            found[_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _line() -> str:
    """The innermost line of the project on the stack."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/src/fewstep/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.split('/src/fewstep/')[-1]}:{frame.f_lineno} ({frame.f_code.co_name})"


# --- the tests that need a GPU ----------------------------------------------------------------------------------------


def equality(device: str, tiny: bool) -> Cases:
    """The tests marked ``gpu``: every objective's losses on both devices among them. On a CPU they are skipped."""
    return {"pytest -m gpu": run_gpu_tests}


def run_gpu_tests() -> dict[str, Any]:
    files = [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{run.stdout[-12_000:]}\n{run.stderr[-2000:]}")
    summary = run.stdout.strip().splitlines()[-1]
    return {"summary": summary} | {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", summary)}


# --- processes --------------------------------------------------------------------------------------------------------


def processes(device: str, tiny: bool) -> Cases:
    """Two data-parallel processes on one device, and what NCCL answers to that."""
    cases: Cases = {"gloo": partial(two_processes, device)}
    return cases if device == "cpu" else cases | {"nccl": partial(refusal_of_nccl, device)}


def two_processes(device: str) -> dict[str, Any]:
    """Three steps of two processes against three of one that accumulates: the largest relative difference of losses."""
    from tiny_runs import settings

    with tempfile.TemporaryDirectory() as folder:
        raw = settings("tdm", Path(folder), device, "float32") | {"accumulate": 2, "health": {"every": 0}}
        one = losses_of(raw, device, SINGLE_PROCESS)
        file = Path(folder) / "losses.json"
        torch.multiprocessing.spawn(train_process, args=(_port(), raw, device, str(file)), nprocs=2)
        two = json.loads(file.read_text("utf-8"))
    return {"one": one, "two": two, "difference": max(abs(two[name] / one[name] - 1) for name in one)}


def train_process(rank: int, port: int, raw: dict[str, Any], device: str, file: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    losses = losses_of(raw, device, World(rank, 2))
    if rank == 0:
        Path(file).write_text(json.dumps(losses), "utf-8")
    torch.distributed.destroy_process_group()


def losses_of(raw: dict[str, Any], device: str, world: World) -> dict[str, float]:
    config, place = parse_config(raw, "the benchmark of processes"), torch.device(device)
    metrics = Trainer(config, build_inputs(config, place, world=world), place, world).advance(3)
    return {name: value for name, value in metrics.items() if name.startswith("loss/")}


def refusal_of_nccl(device: str) -> dict[str, Any]:
    try:
        torch.multiprocessing.spawn(add_by_nccl, args=(_port(), device), nprocs=2)
    except Exception as error:
        return {"accepted": False, "message": str(error).strip()[-1500:]}
    return {"accepted": True}


def add_by_nccl(rank: int, port: int, device: str) -> None:
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x = torch.ones(1, device=device)
    torch.distributed.all_reduce(x)
    assert x.item() == 2
    torch.distributed.destroy_process_group()


def _port() -> int:
    return 20_000 + (os.getpid() * 31 + time.time_ns() // 10**6) % 20_000
