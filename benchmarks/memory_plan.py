"""Compares planned memory with the peak of training: ``python benchmarks/memory_plan.py results/memory_plan.json``.

Random diffusers pipelines of three families and the bundled U-Net are trained on the CPU for a few steps, with health
checks. torch's profiler reports every allocation and release of torch's CPU allocator; their running sum has the peak.
Weights are copied once before, because safetensors files are mapped into memory, which the allocator does not see.
Split networks are trained by two and four processes, of which the first is measured; it copies its rows itself.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from fewstep.core.files import write_tensors, write_text
from fewstep.core.torchvision_compat import prepare_torchvision
from fewstep.distill.build import build_inputs
from fewstep.distill.config import Config
from fewstep.distill.config_files import load_config
from fewstep.distill.memory import plan_memory
from fewstep.distill.processes import World
from fewstep.distill.trainer import Trainer
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.encoded import Index
from fewstep.models.hub.folder import PipelineFolder

TOKENS = 77
MiB = 2**20
UNET = {
    "sample_size": 32, "layers_per_block": 2, "block_out_channels": (64, 128), "cross_attention_dim": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
FLUX = {
    "in_channels": 64, "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64, "num_attention_heads": 4,
    "joint_attention_dim": 256, "pooled_projection_dim": 128, "guidance_embeds": True, "axes_dims_rope": (8, 28, 28),
}  # fmt: skip
WAN = {
    "num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 256, "ffn_dim": 1024, "num_layers": 6,
}  # fmt: skip
PIPELINES: Mapping[str, tuple[str, str, Mapping[str, Any], tuple[int, int, int]]] = {
    "Stable Diffusion": ("StableDiffusionPipeline", "UNet2DConditionModel", UNET, (256, 256, 1)),
    "FLUX.1": ("FluxPipeline", "FluxTransformer2DModel", FLUX, (256, 256, 1)),
    "Wan": ("WanPipeline", "WanTransformer3DModel", WAN, (128, 128, 17)),
}
ADAPTERS = {"rank": 16}
BF16 = {"weights": "bfloat16", "precision": "bfloat16"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "copies": {},
    "copies, checkpointing": {"gradient_checkpointing": True},
    "copies, bfloat16, checkpointing": {"gradient_checkpointing": True, **BF16},
    "adapters": {"adapters": ADAPTERS},
    "adapters, checkpointing": {"adapters": ADAPTERS, "gradient_checkpointing": True},
    "adapters, bfloat16": {"adapters": ADAPTERS, **BF16},
    "copies, 4 micro-batches": {"accumulate": 4},
}
SPLIT: Mapping[str, Mapping[str, Any]] = {
    "split copies": {"shard": True},
    "split copies, checkpointing": {"shard": True, "gradient_checkpointing": True},
    "adapters on a split network": {"shard": True, "adapters": ADAPTERS},
}


def write_pipeline(name: str, folder: Path) -> Path:
    """A pipeline of random weights without encoders and VAE, and encoded prompts for it in ``prompts``."""
    prepare_torchvision()
    import diffusers

    pipeline, network, settings, _ = PIPELINES[name]
    torch.manual_seed(0)
    module = getattr(diffusers, network)(**settings)
    part, scheduler = ("unet", diffusers.DDIMScheduler()) if "UNet" in network else ("transformer", None)
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    module.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, part: ["diffusers", network]}
    write_text(json.dumps(index | {"scheduler": ["diffusers", type(scheduler).__name__]}), folder / "model_index.json")
    shapes = PipelineFolder.open(folder).family.condition_shapes
    sizes = {key: (TOKENS, *shape[1:]) if key == "prompt" else shape for key, shape in shapes.items()}
    write_tensors(
        {key: torch.randn(8, *size) for key, size in sizes.items()}, folder / "prompts/shard-00000.safetensors"
    )
    write_tensors({key: torch.zeros(1, *size) for key, size in sizes.items()}, folder / "prompts/null.safetensors")
    content = Index(pipeline=pipeline, encoders="", prompts="", count=8, rows=8)
    write_text(content.model_dump_json(), folder / "prompts/index.json")
    return folder


def config_of(teacher: str, **changes: Any) -> Config:
    """Three steps of TDM with two critic updates and a health check."""
    trained = {"lr": 1e-5, "ema": 0.9}
    objective = {"name": "tdm", "steps": 2, "guidance": 2.0, "critic_updates": 2}
    stage = {"steps": 3, "objective": objective, "roles": {"student": trained, "fake": {"lr": 1e-5}}}
    health = {"every": 2, "conditions": 2, "seeds": 2, "teacher_steps": 2}
    settings = {"teacher": teacher, "batch": 2, "device": "cpu", "health": health, "stages": [stage], **changes}
    return Config.model_validate(settings)


def causal_config() -> Config:
    """Four steps of a new causal student of clips."""
    changes = ("networks={causal: {backbone: {causal: true}}}", "stages.0.steps=4", "batch=2", "previews.every=0")
    return load_config("emoji_video/self_forcing.yaml", [*changes, "device=cpu"])


def measured_peak(config: Config) -> int:
    """The most bytes that torch's CPU allocator holds while the config's run is trained."""
    device = torch.device("cpu")
    inputs = build_inputs(config, device)
    module = inputs.roles["teacher"].module
    assert isinstance(module, Denoiser)
    network = module.backbone.shared_network if isinstance(module.backbone, AdapterView) else module
    tensors = [*network.parameters(), *network.buffers()]
    before = [tensor.data for tensor in tensors]  # alive until the end, so that no release of them is counted
    gc.collect()  # or the release of an earlier run's tensors would be counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data.clone()
        Trainer(config, inputs, device).train()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return highest(events)


def highest(events: list[Any]) -> int:
    """The highest running sum of allocations and releases."""
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure_split(rank: int, size: int, config: Config, port: int, file: str) -> None:
    """Trains as one of ``size`` processes; the first writes its peak."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world, device = World(rank, size, None, init_device_mesh("cpu", (size,))), torch.device("cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Trainer(config, build_inputs(config, device, world=world), device, world).train()
    if rank == 0:
        assert profiler.profiler is not None
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        Path(file).write_text(str(highest(events)))
    torch.distributed.destroy_process_group()


def measured_on(devices: int, config: Config) -> int:
    """``measured_peak`` of the first of several processes."""
    with tempfile.NamedTemporaryFile() as file:
        port = 20_000 + os.getpid() * 31 % 20_000
        torch.multiprocessing.spawn(measure_split, args=(devices, config, port, file.name), nprocs=devices)
        return int(Path(file.name).read_text())


def compare(network: str, variant: str, config: Config, devices: int = 1) -> dict[str, Any]:
    """A record of the results: planned and measured MiB, and their ratio."""
    planned = plan_memory(config, devices).total
    measured = measured_peak(config) if devices == 1 else measured_on(devices, config)
    return {
        "network": network, "run": variant, "processes": devices, "batch": config.batch,
        "planned MiB": round(planned / MiB, 1), "measured MiB": round(measured / MiB, 1),
        "ratio": round(planned / measured, 3),
    }  # fmt: skip


def main(file: Path) -> None:
    records = []

    def add(*arguments: Any) -> None:
        records.append(compare(*arguments))
        print(*records[-1].values(), file=sys.stderr, flush=True)

    for batch in (16, 64):
        add("bundled U-Net", "copies", config_of("fashion", batch=batch))
    add("bundled U-Net", "adapters", config_of("fashion", batch=16, adapters=ADAPTERS))
    add("bundled U-Net of clips", "causal rollout", causal_config())
    with tempfile.TemporaryDirectory() as temporary:
        for name, (*_, size) in PIPELINES.items():
            folder = write_pipeline(name, Path(temporary) / name)
            prompts = {"kind": "prompts", "path": str(folder / "prompts")}
            for variant, changes in VARIANTS.items():
                add(name, variant, config_of(str(folder), size=size, data=prompts, **changes))
            for (variant, changes), devices in product(SPLIT.items(), (2, 4)):
                split = config_of(str(folder), size=size, data=prompts, accumulate=devices, **changes)
                add(name, variant, split, devices)
    write_text(json.dumps(records, indent=1) + "\n", file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
