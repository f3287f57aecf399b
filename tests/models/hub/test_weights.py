"""The weight files of a pipeline: pickles are never opened, and an adapter knows the weights of its base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_pipelines import ADAPTERS, settings

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.distill.config_files import parse_config
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model

diffusers = pytest.importorskip("diffusers")
Saved = Callable[[str], Path]


def copied(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)


@pytest.mark.usefixtures("no_pickle")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_in_a_pickle_are_never_opened(saved: Saved, part: str, tmp_path: Path) -> None:
    folder = copied(saved("sd"), tmp_path / "pickled")
    [file] = (folder / part).glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    opened = PipelineFolder.open(folder)
    with pytest.raises(UserError, match=rf"{part} are a pickle \(\w+\.bin\).*save_pretrained"):
        opened.denoiser() if part == "unet" else opened.pipeline()


@pytest.mark.usefixtures("no_pickle")
def test_a_pickle_beside_safetensors_is_ignored(saved: Saved, tmp_path: Path) -> None:
    folder = copied(saved("sd"), tmp_path / "both")
    for part in ("unet", "vae", "text_encoder"):
        [file] = (folder / part).glob("*.safetensors")
        file.with_suffix(".bin").write_bytes(b"not weights")
    opened = PipelineFolder.open(folder)
    opened.pipeline(opened.denoiser().backbone.network)


def test_the_hash_covers_the_files_that_are_loaded(saved: Saved, tmp_path: Path) -> None:
    folder = copied(saved("sd"), tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = PipelineFolder.open(folder).sha256
    assert before == hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant, which is not loaded")
    assert PipelineFolder.open(folder).sha256 == before
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    index = json.loads((folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = [folder / "unet" / name for name in sorted(set(index["weight_map"].values()))]
    assert len(shards) > 1
    content = b"".join(shard.read_bytes() for shard in shards)
    assert PipelineFolder.open(folder).sha256 == hashlib.sha256(content).hexdigest()
    PipelineFolder.open(folder).denoiser()
    shards[0].unlink()
    with pytest.raises(UserError, match="is missing"):
        _ = PipelineFolder.open(folder).sha256


@pytest.mark.parametrize("parts", [("unet",), ("unet", "vae", "text_encoder"), ("vae",)])
@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_with_weights_of_the_fp16_variant_only_is_loaded(
    saved: Saved, parts: tuple[str, ...], shards: bool, tmp_path: Path
) -> None:
    folder = copied(saved("sd"), tmp_path / "fp16")
    plain = PipelineFolder.open(saved("sd"))
    pipeline = plain.pipeline(plain.denoiser().backbone.network)
    for part in parts:
        shutil.rmtree(folder / part)
        component = getattr(pipeline, part)
        size = {"max_shard_size": "1MB"} if shards else {}
        component.half().save_pretrained(folder / part, variant="fp16", **size)
        component.float()
    opened = PipelineFolder.open(folder)
    assert len(opened.sha256) == 64
    denoiser = opened.denoiser()
    assert denoiser.backbone.network.dtype == torch.float32
    loaded = opened.pipeline(denoiser.backbone.network)
    for part in ("unet", "vae", "text_encoder"):
        for (name, a), b in zip(
            getattr(loaded, part).named_parameters(), getattr(pipeline, part).parameters(), strict=True
        ):
            expected = b.half().float() if part in parts else b
            assert torch.equal(a, expected), (part, name)


def test_an_adapter_is_refused_by_a_base_with_other_weights(saved: Saved, tmp_path: Path) -> None:
    base = copied(saved("sd"), tmp_path / "base")
    run = fewstep.train(parse_config(settings(base, "sd", tmp_path / "run", ADAPTERS), "test"))
    config = json.loads((run / "student" / "config.json").read_text())
    assert config["base_sha256"] == PipelineFolder.open(base).sha256
    load_model(run / "student")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(file)
    tensors["conv_in.bias"] += 1
    write_tensors(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"trained on other weights.*{config['base_sha256']}"):
        load_model(run / "student")
