"""A user's own pipeline through the commands: encode, explain, train, sample and export to LoRA and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import yaml
from commands import refused, succeeds
from PIL import Image
from tiny_pipelines import ADAPTERS, settings

pytest.importorskip("peft")


def test_the_full_pipeline_from_prompts_to_lora_and_diffusers(saved: Callable[[str], Path], tmp_path: Path) -> None:
    teacher, run, prompts = saved("sd"), tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\nthe sea\n")
    encoded = tmp_path / "encoded"
    assert "3 are encoded" in succeeds("data", "encode", prompts, "--teacher", teacher, "--out", encoded)
    raw = settings(teacher, "sd", run, ADAPTERS, data={"kind": "prompts", "path": str(encoded)})
    raw["stages"][0]["objective"]["steps"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    assert "student.lr" in succeeds("explain", tmp_path / "config.yaml")
    succeeds("train", tmp_path / "config.yaml")
    succeeds("sample", run, "--prompt", "a cat", "--seeds", "0-2", "--out", tmp_path / "images")
    names = sorted(file.name for file in (tmp_path / "images").glob("*.png"))
    assert names == ["00000-0.png", "00000-1.png", "00000-2.png"]
    assert "gives the same output" in succeeds("export", run, "--to", "lora", "--out", tmp_path / "lora")
    assert "gives the same output" in succeeds("export", run, "--to", "diffusers", "--out", tmp_path / "pipeline")
    student = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    base = diffusers.DiffusionPipeline.from_pretrained(teacher)
    base.load_lora_weights(tmp_path / "lora")
    for pipeline in (student, base):
        image = pipeline("a cat", num_inference_steps=4, guidance_scale=1.0, height=16, width=16).images[0]
        assert isinstance(image, Image.Image)
        assert image.size == (16, 16)


@pytest.mark.parametrize(("size", "message"), [("16", "--size is HEIGHTxWIDTH"), ("16x16", "--out is a folder")])
def test_a_sample_of_prompts_needs_a_size_and_a_folder(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, message: str
) -> None:
    options = ("--prompt", "a cat", "--size", size, "--out", tmp_path / "a.png")
    assert message in refused(capsys, "sample", saved("sd"), *options)
