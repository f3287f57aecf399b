"""The measurements of ``gpu.py`` on small networks. Each function returns the cases of a part by name."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import fewstep
from fewstep.api.bench_cost import bench_sampler, bench_step, timed
from fewstep.core.environment import environment
from fewstep.distill.config_files import load_config
from fewstep.distill.memory import plan_memory
from fewstep.models.attention import Backend
from fewstep.models.attention import attention as attend
from fewstep.models.compilation import graphs
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


def step(device: str, tiny: bool, *changes: str) -> Cases:
    """``fewstep bench step`` of the two demos in both precisions."""
    rounds, small = (2, ["batch=2"]) if tiny else (10, [])
    return {
        f"{demo}, {precision}": partial(
            step_cost, demo, [f"precision={precision}", f"device={device}", *changes, *small], rounds
        )
        for demo in ("fashion", "emoji") for precision in ("bfloat16", "float32")
    }  # fmt: skip


def compiled(device: str, tiny: bool) -> Cases:
    """The same with compiled blocks."""
    cases = step(device, tiny, "compile=true")
    return dict(list(cases.items())[:1]) if tiny else cases


def graphed(device: str, tiny: bool) -> Cases:
    """The same with CUDA graphs, against evaluations without them; none without a GPU."""
    return step(device, tiny, "cuda_graphs=true") if device == "cuda" else {}


def step_cost(demo: str, overrides: list[str], rounds: int) -> dict[str, Any]:
    config = load_config(ROOT / f"configs/{demo}/demo.yaml", overrides)
    before, on_gpu = graphs(), config.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = bench_step(config, rounds) | {"teacher": config.teacher, "graphs": graphs() - before}
    if on_gpu:  # reserved, because CUDA graphs keep what they once took
        result |= {"planned_bytes": plan_memory(config).total, "peak_bytes": torch.cuda.max_memory_reserved()}
    return result


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
            if not all(map(math.isfinite, errors)):
                raise RuntimeError("its result is not finite")
            seconds = [timed(partial(both_passes, backend, inputs), device) for _ in range(7)][2:]
        except Exception as error:  # of many types, where a kernel does not support the shape, the type or the device
            found["backends"][backend] = {"refused": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            continue
        found["backends"][backend] = {
            "error": errors[0], "gradient_error": max(errors[1:]), "milliseconds": 1e3 * statistics.median(seconds),
        }  # fmt: skip
    return found


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
