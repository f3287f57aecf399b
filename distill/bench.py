"""What the loop costs: a full step against its bare network evaluations, and the memory of adapters and copies."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.config import Config
from fewstep.distill.devices import pick_device
from fewstep.distill.record import environment
from fewstep.distill.run import Run
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.store import Model
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.sample import plan


@dataclass(frozen=True)
class Call:
    """One evaluation of a role's backbone, as a step made it; ``graph`` tells whether it was differentiated."""

    role: str
    backbone: nn.Module
    x: Tensor
    t: Tensor
    condition: Condition
    graph: bool

    def bare(self) -> None:
        """The evaluation alone and, where there was one, its backward pass into the network's parameters."""
        with torch.set_grad_enabled(self.graph):
            output = self.backbone(self.x, self.t, self.condition)
        if self.graph:
            torch.autograd.backward(output, torch.ones_like(output), inputs=list(self.backbone.parameters()))


def calls_of(run: Run, work: Callable[[], object]) -> list[Call]:
    """The network evaluations that ``work`` makes through the run's roles, in order."""
    calls: list[Call] = []

    def hook(role: str, module: nn.Module, inputs: tuple[Tensor, Tensor, Condition], output: Tensor) -> None:
        x, t, condition = inputs
        calls.append(Call(role, module, x.detach(), t, condition, torch.is_grad_enabled()))

    denoisers = {name: role.module for name, role in run.roles.items() if isinstance(role.module, Denoiser)}
    handles = [module.backbone.register_forward_hook(partial(hook, name)) for name, module in denoisers.items()]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def bench_step(config: Config, rounds: int) -> dict[str, Any]:
    """Medians over ``rounds`` of a full cycle of updates (optimizers and averages included), of its bare evaluations,
    and of their paired ratio. A cycle is the fewest steps in which every update happens."""
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), device)
        cycle = range(max(update.due.every for update in run.objective.updates))

        def full() -> None:
            for step in cycle:
                run.loop.step(step)

        calls = calls_of(run, full)

        def bare() -> None:
            for call in calls:
                call.bare()
            for role in run.roles.values():
                role.module.zero_grad()

        pairs = [(timed(full, device), timed(bare, device)) for _ in range(rounds + 1)][1:]
    return {
        "objective": config.stages[0].objective.model_dump(mode="json"),
        "batch": config.batch,
        "steps_a_cycle": len(cycle),
        "evaluations_a_cycle": len(calls),
        "samples_evaluated": sum(len(call.x) for call in calls),
        "seconds_full": statistics.median(full for full, _ in pairs),
        "seconds_bare": statistics.median(bare for _, bare in pairs),
        "ratio": statistics.median(full / bare for full, bare in pairs),
        "rounds": rounds,
        **environment(device),
    }


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that ``work`` takes, the accelerator's queue included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def bench_sampler(model: Model, solver: str, steps: int, batch: int, rounds: int) -> dict[str, Any]:
    """N steps of a solver, in inference mode as they are sampled, against N bare calls of the network at the same times
    without gradients (``ratio``) and in inference mode, too (``ratio_same_mode``): medians of paired ratios."""
    rule, times = plan(solver, steps, model.config, folder=model.path)
    x = torch.randn(batch, *model.config.shape, device=model.device)
    classes = max(1, model.config.classes)
    condition = Condition.of_labels(torch.arange(batch, device=model.device) % classes, classes)
    predict = Predictor(model.denoiser, condition)
    rule(predict, x, times, lambda: torch.randn_like(x))
    told = [torch.full((batch,), t, dtype=torch.float64) for t in times]

    def bare() -> None:
        for k in range(predict.nfe):
            model.denoiser.backbone(x, told[k % steps], condition)

    @torch.inference_mode()
    def full() -> None:
        rule(Predictor(model.denoiser, condition), x, times, lambda: torch.randn_like(x))

    bare()
    works = (full, bare, torch.inference_mode()(bare))
    rows = [[timed(work, model.device) for work in works] for _ in range(rounds)]
    ratios = [full / bare for full, bare, _ in rows]
    return {
        "solver": solver, "steps": steps, "evaluations": predict.nfe, "batch": batch,
        "seconds_full": statistics.median(full for full, *_ in rows),
        "seconds_bare": statistics.median(bare for _, bare, _ in rows),
        "ratio": statistics.median(ratios), "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "ratio_same_mode": statistics.median(full / same for full, _, same in rows),
        "rounds": rounds, **environment(model.device),
    }  # fmt: skip


def bench_memory(config: Config) -> dict[str, Any]:
    """Bytes of parameters (each storage once) and the peak of a cycle of updates, as configured and, where that has
    adapters, with copies instead; each in a process of its own."""
    modes = {"adapters": config, "copies": config.model_copy(update={"adapters": None})}
    if config.adapters is None:
        del modes["adapters"]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        result: dict[str, Any] = {name: pool.apply(memory_of, (mode,)) for name, mode in modes.items()}
    if len(result) == 2:
        for quantity in ("parameters", "peak"):
            result[f"{quantity}_ratio"] = result["adapters"][quantity] / result["copies"][quantity]
    return result | environment(pick_device(config.device))


def memory_of(config: Config) -> dict[str, int]:
    """``parameters``: bytes of all roles' weights, each storage once; ``peak``: bytes above those before the run, at
    the most, of weights, gradients, moments and activations."""
    device = pick_device(config.device)
    before = _most_memory(device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder), device)
        for step in range(2 * max(update.due.every for update in run.objective.updates)):
            run.loop.step(step)
        storages = {}
        for role in run.roles.values():
            backbone = role.module.backbone if isinstance(role.module, Denoiser) else role.module
            module = backbone.shared_network if isinstance(backbone, AdapterView) else role.module
            for parameter in module.parameters():
                storages[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    return {"parameters": sum(storages.values()), "peak": _most_memory(device) - before}


def _most_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the accelerator, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
