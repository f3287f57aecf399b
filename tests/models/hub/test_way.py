"""The whole way of a user's own pipeline through the real commands: prompts in, a LoRA and a pipeline out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import yaml
from PIL import Image
from tiny_pipelines import ADAPTERS, settings

pytest.importorskip("peft")


def fewstep(*arguments: object) -> str:
    command = [sys.executable, "-m", "fewstep", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prompts_in_lora_and_pipeline_out(saved: Callable[[str], Path], tmp_path: Path) -> None:
    teacher, run, prompts = saved("sd"), tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\nthe sea\n")
    assert "3 are encoded" in fewstep("encode", prompts, "--teacher", teacher, "--out", tmp_path / "encoded")
    raw = settings(teacher, "sd", run, ADAPTERS, data={"kind": "prompts", "path": str(tmp_path / "encoded")})
    raw["stages"][0]["objective"]["steps"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    assert "student.lr" in fewstep("show", tmp_path / "config.yaml")
    fewstep("train", tmp_path / "config.yaml")
    fewstep("sample", run, "--prompt", "a cat", "--seeds", "0-2", "--out", tmp_path / "pictures")
    names = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert names == ["00000-0.png", "00000-1.png", "00000-2.png"]
    assert "the same" in fewstep("export", run, "--to", "lora", "--out", tmp_path / "lora")
    assert "the same" in fewstep("export", run, "--to", "diffusers", "--out", tmp_path / "pipeline")
    student = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    base = diffusers.DiffusionPipeline.from_pretrained(teacher)
    base.load_lora_weights(tmp_path / "lora")
    for pipeline in (student, base):
        image = pipeline("a cat", num_inference_steps=4, guidance_scale=1.0, height=16, width=16).images[0]
        assert isinstance(image, Image.Image)
        assert image.size == (16, 16)


def test_a_sample_of_prompts_goes_to_a_folder(saved: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewstep", "sample", str(saved("sd")), "--prompt", "a cat", "--size"]
    for size, message in (("16", "--size is HEIGHTxWIDTH"), ("16x16", "--out is a folder")):
        done = subprocess.run([*command, size, "--out", str(tmp_path / "a.png")], capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
