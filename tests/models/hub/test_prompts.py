"""Sampling a pipeline from prompts, and loading pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import TINY

import fewstep
from fewstep.api.data import make_ode_pairs, make_preferences
from fewstep.api.evaluate import win_rates
from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model, pipeline_of
from fewstep.samplers.generate import GeneratedSet, ImageGenerator
from fewstep.samplers.plan import SamplingConfig

pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
LINES = ["a cat", "two dogs", "the sea"]


def test_sample_files_do_not_depend_on_the_batch(saved: Saved, tmp_path: Path) -> None:
    model = load_model(saved("sd"), size=TINY["sd"].size)
    settings = {"seeds": [0, 3], "sampling": SamplingConfig(steps=2, guidance=2.0)}
    files = fewstep.sample_files(model, LINES, tmp_path / "one", batch=1, **settings)
    assert [file.name for file in files] == [f"{k:05d}-{seed}.png" for seed in (0, 3) for k in range(3)]
    many = fewstep.sample_files(model, LINES, tmp_path / "many", batch=3, **settings)
    for a, b in zip(files, many, strict=True):
        with Image.open(a) as left, Image.open(b) as right:
            assert left.size == (16, 16)
            difference = np.asarray(left).astype(int) - np.asarray(right)
            assert abs(difference).max() <= 2
    kept = files[1].stat().st_mtime_ns
    files[2].unlink()
    fewstep.sample_files(model, LINES, tmp_path / "one", batch=2, **settings)
    assert files[1].stat().st_mtime_ns == kept
    assert files[2].is_file()
    assert fewstep.sample(model, prompts=LINES[:2], sampling=SamplingConfig(steps=2)).shape == (2, 3, 16, 16)


def test_a_folder_with_other_samples_is_refused_not_reported_as_done(saved: Saved, tmp_path: Path) -> None:
    """Other seeds and a repeated call continue; other prompts, sampling or weights would find their files present."""
    model, out = load_model(saved("sd"), size=TINY["sd"].size), tmp_path / "out"
    one = SamplingConfig(steps=1)
    fewstep.sample_files(model, LINES, out, sampling=one)
    fewstep.sample_files(model, LINES, out, sampling=one, seeds=[0, 1])
    fewstep.sample_files(model, LINES, out, sampling=SamplingConfig(steps=1, seed=2), seeds=[3])
    other = load_model(saved("sd"), size=TINY["sd"].size)
    next(other.denoiser.parameters()).data += 0.1
    changes = [
        (model, [*LINES[:2], "a dog"], one), (model, LINES[:2], one), (model, LINES, SamplingConfig(steps=2)),
        (model, LINES, SamplingConfig(steps=1, guidance=2.0)), (other, LINES, one),
        (load_model(saved("sd"), size=(16, 32, 1)), LINES, one),
    ]  # fmt: skip
    for source, prompts, sampling in changes:
        with pytest.raises(UserError, match="contains samples of other prompts, of another model"):
            fewstep.sample_files(source, prompts, out, sampling=sampling)
    (out / "samples.json").unlink()
    with pytest.raises(UserError, match="contains samples of other prompts"):
        fewstep.sample_files(model, LINES, out, sampling=one)
    assert len(list(out.glob("*.png"))) == 9


def test_labels_and_prompts_are_refused_by_models_of_the_other_kind(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes class labels"):
        fewstep.sample("fashion", prompts=["a shoe"])
    with pytest.raises(UserError, match="takes prompts"):
        fewstep.sample(load_model(saved("sd"), size=(16, 16, 1)), n=2)
    for work in (
        lambda: make_ode_pairs(saved("sd"), tmp_path / "pairs.safetensors", n=2),
        lambda: make_preferences(saved("sd"), tmp_path / "pairs.safetensors", reward="symmetry", n=2),
        lambda: win_rates(saved("sd"), saved("sd"), n=2),
    ):
        with pytest.raises(UserError, match="this one takes prompts"):
            work()
    with pytest.raises(UserError, match="n must be at least 1, got 0"):
        win_rates("fashion", "fashion", n=0)


def test_prompts_are_encoded_in_parts_and_each_once_per_part(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings of 30,000 captions would fill the memory."""
    model, encoded, encode = load_model(saved("sd"), size=(16, 16, 1)), [], PipelineFolder.condition

    def recorded(folder: PipelineFolder, pipeline: object, prompts: list[str]) -> Condition:
        encoded.append(prompts)
        return encode(folder, pipeline, prompts)

    monkeypatch.setattr(PipelineFolder, "condition", recorded)
    monkeypatch.setattr("fewstep.samplers.generate.PART", 4)
    generated = GeneratedSet(model, SamplingConfig("euler", 1), 7, LINES[:2])
    parts = list(generated.parts())
    assert [len(part) for part in parts] == [4, 3]
    assert encoded == [LINES[:2], LINES[:2]]
    assert generated.nfe == 1
    at_once = ImageGenerator(model, LINES[:2])([0, 1, 0, 1, 0, 1, 0], SamplingConfig("euler", 1))
    assert (torch.cat(parts).int() - at_once.int()).abs().max() <= 2


def test_unsupported_pipelines_and_sizes_are_refused(tmp_path: Path, saved: Saved) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model_index.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(UserError, match=r"'DiTPipeline' are not supported.*FluxPipeline.*WanPipeline"):
        load_model(tmp_path / "other")
    with pytest.raises(UserError, match=r"15 x 16 pixels: .* multiples of 2"):
        load_model(saved("sd"), size=(15, 16, 1))
    with pytest.raises(UserError, match=r"8 frames: this model needs a multiple of 4 plus 1"):
        load_model(saved("wan"), size=(32, 32, 8))
    assert pipeline_of(load_model(saved("sd"))).path == saved("sd")
