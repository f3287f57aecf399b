"""What the loop costs: a full step against its bare network evaluations, and the memory of adapters and copies."""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.core.devices import pick_device
from fewstep.core.environment import environment
from fewstep.distill.build import build_inputs
from fewstep.distill.config import Config
from fewstep.distill.explain import Evaluation, evaluations_of
from fewstep.distill.trainer import Trainer
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import Model, is_pipeline, resolve_path
from fewstep.samplers.plan import SamplingConfig, plan
from fewstep.samplers.predictor import Predictor


def computing_in(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a denoiser of this precision evaluates its backbone."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def bare(evaluation: Evaluation, precision: torch.dtype) -> None:
    """The evaluation alone, in the run's precision, and, where it had a graph, its backward pass into the network's
    parameters."""
    backbone = evaluation.backbone
    with torch.set_grad_enabled(evaluation.graph), computing_in(precision, evaluation.x.device):
        output = backbone(evaluation.x, evaluation.t, evaluation.condition)
    if evaluation.graph:
        torch.autograd.backward(output, torch.ones_like(output), inputs=list(backbone.parameters()))


def bench_step(config: Config, rounds: int) -> dict[str, Any]:
    """Medians over ``rounds`` of a full cycle of updates (optimizers and averages included), of its bare evaluations,
    and of their paired ratio. A cycle is the fewest steps in which every update happens."""
    device = pick_device(config.device)
    trainer = Trainer(config, build_inputs(config, device), device)
    cycle = range(max(update.due.n for update in trainer.objective.updates))

    def full() -> None:
        for step in cycle:
            trainer.loop.step(step)

    evaluations = evaluations_of(trainer.roles, full)

    def all_bare() -> None:
        for evaluation in evaluations:
            bare(evaluation, trainer.roles.precision)
        for role in trainer.roles.values():
            role.module.zero_grad()

    pairs = [(timed(full, device), timed(all_bare, device)) for _ in range(rounds + 1)][1:]
    return {
        "objective": config.stages[0].objective.model_dump(mode="json"),
        "batch": config.batch,
        "steps_a_cycle": len(cycle),
        "evaluations_a_cycle": len(evaluations),
        "samples_evaluated": sum(len(evaluation.x) for evaluation in evaluations),
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
def bench_sampler(model: Model, sampling: SamplingConfig, batch: int, rounds: int) -> dict[str, Any]:
    """N steps of a solver, in inference mode as they are sampled, against N bare calls of the network at the same times
    without gradients (``ratio``) and in inference mode, too (``ratio_same_mode``): medians of paired ratios."""
    rule, times = plan(model, sampling)
    steps = len(times) - 1
    x = torch.randn(batch, *model.config.shape, device=model.device)
    condition = Condition.of_labels(model.labels(batch), model.config.classes).to(model.device)
    predict = Predictor(model.denoiser, condition)
    rule(predict, x, times, lambda: torch.randn_like(x))
    batch_times = [torch.full((batch,), t, dtype=torch.float64) for t in times]

    def bare() -> None:
        with computing_in(model.denoiser.precision, model.device):
            for k in range(predict.nfe):
                model.denoiser.backbone(x, batch_times[k % steps], condition)

    @torch.inference_mode()
    def full() -> None:
        rule(Predictor(model.denoiser, condition), x, times, lambda: torch.randn_like(x))

    bare()
    works = (full, bare, torch.inference_mode()(bare))
    rows = [[timed(work, model.device) for work in works] for _ in range(rounds)]
    ratios = [full / bare for full, bare, _ in rows]
    return {
        "solver": sampling.solver, "steps": steps, "evaluations": predict.nfe, "batch": batch,
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
    _import_libraries(config)
    before = most_memory(device)
    trainer = Trainer(config, build_inputs(config, device), device)
    for step in range(2 * max(update.due.n for update in trainer.objective.updates)):
        trainer.loop.step(step)
    storages = {}
    for role in trainer.roles.values():
        backbone = role.module.backbone if isinstance(role.module, Denoiser) else role.module
        module = backbone.shared_network if isinstance(backbone, AdapterView) else role.module
        for parameter in module.parameters():
            storages[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    return {"parameters": sum(storages.values()), "peak": most_memory(device) - before}


def _import_libraries(config: Config) -> None:
    """Imports what building the config's networks would import, which is no memory of the run."""
    if config.teacher is not None and is_pipeline(config.teacher):
        from fewstep.models.hub.folder import PipelineFolder  # needs the extra

        _ = PipelineFolder.open(resolve_path(config.teacher)).network_class
    if config.adapters is not None:
        importlib.import_module("peft")


def most_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the accelerator, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # of this process alone; ru_maxrss of a forked one begins with its parent's
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
