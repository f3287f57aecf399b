"""The parts of ``gpu.py`` but for the networks of real size. Each function returns its cases by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import fewstep
from fewstep.api.bench_cost import bench_sampler, bench_step, timed
from fewstep.core.environment import environment
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.trainer import Trainer
from fewstep.models.attention import Backend
from fewstep.models.attention import attention as attend
from fewstep.models.compilation import graphs
from fewstep.models.saving import save_model
from fewstep.samplers.generate import generate

ROOT = Path(__file__).resolve().parents[1]
Cases = dict[str, Callable[[], dict[str, Any]]]
PACKAGES = ("triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers", "pytest")


def facts(device: str, tiny: bool) -> Cases:
    return {"machine": partial(machine, torch.device(device))}


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, and what the device reports about itself."""
    installed = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    found = environment(device) | {"torch": torch.__version__, "cuda": torch.version.cuda, "packages": installed}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "capability": [about.major, about.minor], "memory_bytes": about.total_memory,
            "cudnn": torch.backends.cudnn.version(), "nccl": list(torch.cuda.nccl.version()),
        }  # fmt: skip
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return found


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- a step against its evaluations -----------------------------------------------------------------------------------


def step(device: str, tiny: bool, compiled: bool = False) -> Cases:
    """``fewstep bench step`` of the two demos in both precisions."""
    rounds, small = (2, ["batch=2"]) if tiny else (10, [])
    return {
        f"{demo}, {precision}": partial(
            step_cost, demo, [f"precision={precision}", f"device={device}", f"compile={str(compiled).lower()}", *small],
            rounds,
        )
        for demo in ("fashion", "emoji") for precision in ("bfloat16", "float32")
    }  # fmt: skip


def compiled(device: str, tiny: bool) -> Cases:
    """The same with compiled blocks."""
    cases = step(device, tiny, compiled=True)
    return dict(list(cases.items())[:1]) if tiny else cases


def step_cost(demo: str, overrides: list[str], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(ROOT / f"configs/{demo}/demo.yaml", overrides)
        teacher = ROOT / str(config.teacher)
        if demo == "emoji" and not teacher.is_dir():
            model = load_config(ROOT / "configs/emoji/teacher.yaml").model
            assert model is not None
            teacher = Path(folder)
            save_model(model.build(), model, teacher)
        if demo == "emoji":
            config = config.model_copy(update={"teacher": str(teacher)})
        return bench_step(config, rounds) | {"teacher": config.teacher, "graphs": graphs()}


# --- attention --------------------------------------------------------------------------------------------------------

SHAPES = {  # batch, heads, queries, keys, width of a head
    "SDXL 1024 px, image": (2, 10, 4096, 4096, 64),
    "SDXL 1024 px, prompt": (2, 20, 1024, 77, 64),
    "FLUX.1 1024 px": (1, 24, 4608, 4608, 128),
    "bundled fashion": (64, 4, 49, 49, 48),
}


def attention(device: str, tiny: bool) -> Cases:
    """Every back end against plain attention in float64: its output and gradients, and the time of both passes."""
    shapes = {"tiny": (1, 2, 64, 33, 16)} if tiny else SHAPES
    ready = tuple(name for name in get_args(Backend) if name != "flex")
    return {
        f"{name}, {str(dtype).removeprefix('torch.')}{also}": partial(
            backends, names, shape, dtype, torch.device(device)
        )
        for names, also in ((ready, ""), (("flex",), ", flex"))  # last, because it compiles
        for name, shape in shapes.items()
        for dtype in (torch.bfloat16, torch.float32)
    }


def backends(
    names: Sequence[Backend], shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    batch, heads, queries, keys, width = shape
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(batch, heads, n, width, generator=generator, device=device).to(dtype).requires_grad_()
        for n in (queries, keys, keys)
    ]

    def both_passes(backend: Backend, given: list[Tensor]) -> list[Tensor]:
        out = attend(given[0], given[1], given[2], backend)
        return [out, *torch.autograd.grad(out.square().sum() / 2, given)]

    exact = both_passes("math", [x.detach().double().requires_grad_() for x in inputs])
    found: dict[str, Any] = {"shape": shape, "backends": {}}
    for backend in names:
        try:
            ours = both_passes(backend, inputs)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
            seconds = [timed(partial(both_passes, backend, inputs), device) for _ in range(7)][2:]
        except Exception as error:  # of many types, where a kernel does not support the shape, the type or the device
            found["backends"][backend] = {"refused": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            continue
        found["backends"][backend] = {
            "error": errors[0], "gradient_error": max(errors[1:]), "milliseconds": 1e3 * statistics.median(seconds),
        }  # fmt: skip
    return found


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
    return objectives | pipelines


def objective_waits(objective: str, changes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    from tiny_runs import settings

    with tempfile.TemporaryDirectory() as folder:
        raw = settings(objective, Path(folder), device.type, "float32", **changes)
        return count_waits(raw | {"accumulate": 2}, device)


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


# --- sampling and evaluation ------------------------------------------------------------------------------------------


def sampling(device: str, tiny: bool) -> Cases:
    """Images per second of the bundled teacher: sampled, and sampled and scored; and the solver's share of the time."""
    n, rounds = (40, 2) if tiny else (10_000, 10)
    cases: Cases = {}
    for steps in (1,) if tiny else (1, 4):
        cases[f"samples, {steps} steps"] = partial(sampled, steps, n, device)
        cases[f"scores, {steps} steps"] = partial(scored, steps, n, device)
        cases[f"solver, {steps} steps"] = partial(solver_cost, steps, min(n, 500), rounds, device)
    return cases


def sampled(steps: int, n: int, device: str) -> dict[str, Any]:
    model = fewstep.load("fashion", device=device)
    make = partial(generate, model, config=fewstep.SamplingConfig("euler", steps), batch=500)
    timed(lambda: make(model.labels(min(n, 500))), model.device)
    seconds = timed(lambda: make(model.labels(n)), model.device)
    return {"n": n, "images_per_second": n / seconds}


def scored(steps: int, n: int, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        file = Path(folder) / "eval.json"
        scores = fewstep.evaluate("fashion", reference="fashion", steps=[steps], n=n, device=device, json_file=file)
        seconds = time.perf_counter() - started
    values = {score.metric: score.value for score in scores}
    return {"n": n, "images_per_second": n / seconds, "scores": values}


def solver_cost(steps: int, batch: int, rounds: int, device: str) -> dict[str, Any]:
    return bench_sampler(fewstep.load("fashion", device=device), fewstep.SamplingConfig("euler", steps), batch, rounds)
