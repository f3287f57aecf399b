"""Uses a few-step student in diffusers: exports the student of a run as a pipeline, loads it, calls it.

fewstep demo --text
python examples/student_in_diffusers.py runs/demo_text runs/pipeline "a red sneaker on blue"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import fewstep
from fewstep.core.torchvision_compat import prepare_torchvision
from fewstep.models.hub.export_format import ExportFormat


def main(run: str, folder: str, prompt: str) -> None:
    fewstep.export(run, ExportFormat.diffusers, folder)

    # From here on it is diffusers alone; prepare_torchvision() only repairs mismatched installations of torchvision.
    prepare_torchvision()
    from diffusers import DiffusionPipeline

    facts = json.loads((Path(folder) / "fewstep.json").read_text(encoding="utf-8"))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    image = pipeline(
        prompt,
        num_inference_steps=facts["num_inference_steps"],
        guidance_scale=facts["guidance_scale"],
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    file = Path(folder) / "sample.png"
    image.save(file)
    print(f"{facts['num_inference_steps']} steps at times {facts['times']}: {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
