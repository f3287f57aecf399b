"""Adapters on networks of real size with random weights: the planned memory and the peak of training (``gpu.py``).

The networks are those of the shipped configs, built without weights and filled on the device, so that no file and no
host memory is needed; the prompts' embeddings are random, too.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.api.bench_cost import most_memory, timed
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import DTYPES, TrainingInputs
from fewstep.distill.config import Config
from fewstep.distill.config_files import load_config
from fewstep.distill.data.batch import Batch
from fewstep.distill.memory import plan_memory
from fewstep.distill.metrics_logger import to_numbers
from fewstep.distill.roles import Role
from fewstep.distill.trainer import Trainer
from fewstep.models.adapters import checkpoint_gradients, share_network
from fewstep.models.attention import set_attention
from fewstep.models.condition import Condition
from fewstep.models.model_config import ModelConfig
from fewstep.models.skeleton import skeleton

ROOT = Path(__file__).resolve().parents[1]
STEPS, ENOUGH = 3, 30.0  # at most so many steps, and no further one after so many seconds
Cases = dict[str, Callable[[], dict[str, Any]]]
CONFIGS = {  # the shipped config, the bytes that its run is said to fit into, and changes that leave its memory alone
    "sdxl": ("configs/sdxl/dmd2.yaml", 24e9, ["stages.0.objective.critic_updates=1"]),
    "flux": ("configs/flux/tdm.yaml", 80e9, []),
}
SHORT = ["accumulate=2", "health.every=0", "validation.every=0"]  # a third micro-batch needs what the second needs


def sdxl(device: str, tiny: bool) -> Cases:
    return {"training": partial(train, "sdxl", device, tiny)}


def flux(device: str, tiny: bool) -> Cases:
    return {"training": partial(train, "flux", device, tiny)}


def planned(device: str, tiny: bool) -> Cases:
    return {name: partial(plan, name, device, tiny) for name in CONFIGS}


@contextmanager
def config_of(name: str, device: str, tiny: bool) -> Iterator[Config]:
    """The shipped config with short steps; ``tiny`` is with a tiny pipeline of the same family as the teacher."""
    file, _, changes = CONFIGS[name]
    overrides = [*SHORT, *changes, f"device={device}"]
    if device == "cpu":  # it has fewer kernels of attention
        overrides.append("attention=sdpa")
    with tempfile.TemporaryDirectory() as folder:
        if tiny:
            import tiny_pipelines

            tiny_pipelines.TINY[name].build().save_pretrained(folder)
            size = list(tiny_pipelines.TINY[name].size)
            overrides += [f"teacher={folder}", f"size={size}", "batch=1", "adapters.rank=2"]
        yield load_config(ROOT / file, overrides)


def plan(name: str, device: str, tiny: bool) -> dict[str, Any]:
    """The planned memory of the run that ``train`` measures."""
    with config_of(name, device, tiny) as config:
        found = plan_memory(config)
    return {"planned_bytes": found.total, "resident_bytes": found.resident, "peaks": dict(found.peaks)}


def train(name: str, device_name: str, tiny: bool) -> dict[str, Any]:
    """A few steps of the run: seconds of each, and the most memory from the first tensor on."""
    device = torch.device(device_name)
    with config_of(name, device_name, tiny) as config:
        started = time.perf_counter()
        inputs = random_inputs(config, device)
        trainer = Trainer(config, inputs, device)
        built = time.perf_counter() - started
        seconds: list[float] = []
        metrics: list[dict[str, torch.Tensor]] = []
        while len(seconds) < STEPS and (not seconds or time.perf_counter() - started < ENOUGH):
            seconds.append(timed(lambda: metrics.append(trainer.one_step()), device))
    teacher, student = trainer.roles.denoiser("teacher").backbone, trainer.roles["student"]
    parameters = sum(p.numel() for p in teacher.shared_network.parameters())  # type: ignore[union-attr, operator]
    trained = sum(p.numel() for p in student.parameters)
    result = {
        "parameters": parameters, "adapter_parameters": trained, "batch": config.batch,
        "accumulate": config.accumulate, "size": config.size, "seconds_to_build": built, "seconds_per_step": seconds,
        "peak_bytes": most_memory(device), "claimed_bytes": CONFIGS[name][1],
    }  # fmt: skip
    numbers = to_numbers(metrics[-1])
    result["finite"] = all(map(math.isfinite, numbers.values()))
    result["metrics"] = numbers if result["finite"] else {}
    if device.type == "cuda":
        result["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return result


@dataclass(frozen=True)
class RandomPrompts:
    """A source of random conditions with tensors of these shapes, without the batch axis; null conditions are zero."""

    shape: tuple[int, ...]
    condition: Mapping[str, tuple[int, ...]]

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        tensors = {name: random.normal((size, *shape), name) for name, shape in self.condition.items()}
        nulls = {name: torch.zeros(shape) for name, shape in self.condition.items()}
        return Batch(size, self.shape, Condition(tensors, nulls))


def random_inputs(config: Config, device: torch.device) -> TrainingInputs:
    """The inputs of the config's run as ``build_inputs`` prepares them, with random weights and prompts."""
    assert config.teacher is not None
    assert config.adapters is not None
    network = skeleton(config.teacher, config.size, DTYPES[config.weights])
    denoiser = network.denoiser
    if buffers := [name for name, buffer in denoiser.named_buffers() if buffer.is_meta]:
        raise RuntimeError(f"the values of buffers are not known: {buffers}")
    initialise(denoiser.to_empty(device=device))
    set_attention(denoiser.backbone, config.attention, device, DTYPES[config.precision])
    lora = share_network(denoiser, **dict(config.adapters))
    if config.gradient_checkpointing:
        checkpoint_gradients(denoiser.backbone)
    condition = {name: shape for name, (shape, _) in network.condition.items() if name != "guidance"}
    source = RandomPrompts(network.shape, condition)
    model = ModelConfig(backbone={"name": "diffusers"}, shape=network.shape, base=config.teacher, lora=lora)
    return TrainingInputs({"teacher": Role(denoiser)}, {"data": source}, model)


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Small random matrices, norms of scale one, biases of zero; in place."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(float(name.endswith("weight")))
