"""Peaks of host memory while models are loaded, sampled and exported:
``python benchmarks/loading_memory.py results/loading_memory.json``.

A random pipeline of FLUX.1's class with 160 million parameters in bfloat16, in several shards, has two students:
adapters on the bfloat16 base, and a full copy in float32. The cases run in another process, whose memory is read from
``/proc`` (Linux) until they end. ``anonymous`` is memory that the process must hold. ``resident`` also has the pages of
weight files that are mapped into memory, which the kernel can drop at any time. Both are ratios over the bytes of the
base's weights in the type in which the case has them. What is held before a case is not counted, nor are text encoders
and the VAE. (torch's profiler does not tell mapped memory from other, so it is not used here.)
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.api.export import export
from fewstep.api.models import load
from fewstep.core.files import write_text
from fewstep.core.torchvision_compat import prepare_torchvision
from fewstep.models.adapters import share_network
from fewstep.models.condition import Condition
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model, pipeline_of
from fewstep.models.model_config import FewStep
from fewstep.models.saving import save_model
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig

BF16, F32 = torch.bfloat16, torch.float32
SIZE = (128, 128, 1)
FLUX = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 5, "attention_head_dim": 64, "num_attention_heads": 16,
    "joint_attention_dim": 256, "pooled_projection_dim": 128, "guidance_embeds": True, "axes_dims_rope": (8, 28, 28),
}  # fmt: skip
ABSENT = (
    "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor",
)  # fmt: skip


def write_models(folder: Path, settings: Mapping[str, Any], shard: str = "64MB") -> int:
    """``base``, and its students ``adapter`` and ``copy``, inside ``folder``; returns the number of weights."""
    prepare_torchvision()
    import diffusers

    torch.manual_seed(0)
    base = folder / "base"
    network = diffusers.FluxTransformer2DModel(**settings).to(BF16)
    network.save_pretrained(base / "transformer", max_shard_size=shard)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(base / "scheduler")
    index: dict[str, Any] = {"_class_name": "FluxPipeline", **{key: [None, None] for key in ABSENT}}
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    write_text(json.dumps(index), base / "model_index.json")
    few = FewStep(times=(1.0, 0.5), rule="deterministic")
    for name in ("adapter", "copy"):
        model = load_model(base, size=SIZE, dtype=BF16 if name == "adapter" else F32)
        config = model.config.model_copy(update={"few_step": few, "precision": "bfloat16"})
        if name == "adapter":
            lora = share_network(model.denoiser, 16, None, None)
            model.denoiser.backbone = model.denoiser.backbone.fork()
            config = config.model_copy(update={"lora": lora, "base_weights": "bfloat16"})
        with torch.no_grad():
            for parameter in model.denoiser.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        save_model(model.denoiser, config, folder / name)
    return sum(parameter.numel() for parameter in network.parameters())


def sample(source: Path) -> None:
    """A sample from a random condition: the text encoders and the VAE are not counted."""
    model = load(source, "cpu", SIZE)
    shapes = pipeline_of(model).family.condition_shapes
    condition = Condition({name: torch.randn(1, *shape) for name, shape in shapes.items()})
    config = SamplingConfig() if model.config.few_step else SamplingConfig("euler", 2)
    generate(model, condition, config)


def exported(name: str, form: str, dtype: torch.dtype | None = None) -> Callable[[Path], Any]:
    return lambda folder: export(folder / name, ExportFormat(form), folder / "exported", dtype=dtype)


CASES: Mapping[str, tuple[Callable[[Path], Any], torch.dtype]] = {
    "load a pipeline in bfloat16": (lambda folder: load_model(folder / "base", dtype=BF16), BF16),
    "load a pipeline in float32": (lambda folder: load_model(folder / "base", dtype=F32), F32),
    "load a full student": (lambda folder: load_model(folder / "copy"), F32),
    "load a full student in bfloat16": (lambda folder: load_model(folder / "copy", dtype=BF16), BF16),
    "sample the pipeline": (lambda folder: sample(folder / "base"), BF16),
    "sample the adapter": (lambda folder: sample(folder / "adapter"), BF16),
    "sample the full student": (lambda folder: sample(folder / "copy"), F32),
    **{f"export the adapter, {form}": (exported("adapter", form), BF16) for form in ExportFormat},
    "export the adapter, merged, float32": (exported("adapter", "merged", F32), F32),
    "export the full student, diffusers": (exported("copy", "diffusers"), BF16),
    "export the full student, merged": (exported("copy", "merged"), BF16),
    "export the full student, merged, float32": (exported("copy", "merged", F32), F32),
}


def run_cases(folder: Path) -> None:
    """In the child: runs the cases whose names come on stdin, and answers when one can start and when it has ended."""
    _ = PipelineFolder.open(folder / "base").network_class  # imports diffusers
    import peft  # noqa: F401

    for line in sys.stdin:
        gc.collect()
        shutil.rmtree(folder / "exported", ignore_errors=True)
        print("ready", flush=True)
        sys.stdin.readline()
        kept = CASES[line.strip()][0](folder)
        print("done", flush=True)
        del kept


def resident(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory, and of all that is resident, of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous, mapped = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, anonymous + mapped


def measure(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, float, float]]:
    """The name of each case, its peaks of anonymous and of resident memory in bytes, without what was held before; the
    first one is to be skipped."""
    # every tensor gets memory of its own from the system, and gives it back when it is released
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--cases", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True, bufsize=1) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for name in ("sample the pipeline", *names):  # the first one, not counted, imports and compiles
            child.stdin.write(f"{name}\n")
            if child.stdout.readline() != "ready\n":
                raise SystemExit(f"The case before {name!r} failed.")
            before = most = resident(child.pid)
            child.stdin.write("go\n")
            while not select.select([child.stdout], [], [], 0.001)[0]:
                now = resident(child.pid)
                most = max(most[0], now[0]), max(most[1], now[1])
            if child.stdout.readline() != "done\n":
                raise SystemExit(f"The case {name!r} failed.")
            yield name, most[0] - before[0], most[1] - before[1]


def main(file: Path) -> None:
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = write_models(folder, FLUX)
        measured = measure(folder, CASES)
        next(measured)
        for name, *peaks in measured:
            weights = count * CASES[name][1].itemsize
            records.append(
                {
                    "case": name,
                    "weights": str(CASES[name][1]).removeprefix("torch."),
                    "base MiB": round(weights / 2**20),
                }
                | {key: round(peak / weights, 2) for key, peak in zip(("anonymous", "resident"), peaks, strict=True)}
            )
            print(*records[-1].values(), file=sys.stderr, flush=True)
    write_text(json.dumps(records, indent=1) + "\n", file)


if __name__ == "__main__":
    if sys.argv[1] == "--cases":
        run_cases(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
