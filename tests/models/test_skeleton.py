"""Networks from configs alone: their sizes are the published ones, and those of the loaded networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.models.loading import load_model
from fewstep.models.skeleton import encoded_shapes, skeleton

PARAMETERS = {  # of the published weights
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "PixArt-alpha/PixArt-XL-2-512x512": 610_856_096,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_network_has_the_published_number_of_parameters(name: str) -> None:
    pytest.importorskip("diffusers")
    parameters = list(skeleton(name, None, torch.bfloat16).denoiser.parameters())
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in parameters)


@pytest.mark.parametrize("name", ["fashion", "fashion-text"])
def test_a_bundled_network_has_the_tensors_of_the_loaded_one(name: str) -> None:
    built, loaded = skeleton(name, None, torch.float32), load_model(name)
    shapes = [{key: (t.shape, t.dtype) for key, t in d.state_dict().items()} for d in (built.denoiser, loaded.denoiser)]
    assert shapes[0] == shapes[1]
    assert built.shape == loaded.config.shape


def test_the_types_of_weights_are_those_of_diffusers(tmp_path: Path) -> None:
    """Wan keeps some modules in float32, whatever the type of the others."""
    diffusers = pytest.importorskip("diffusers")
    from fewstep.models.hub.folder import PipelineFolder

    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    loaded = PipelineFolder.open(tmp_path).denoiser(torch.bfloat16)
    built = skeleton(str(tmp_path), (16, 16, 1), torch.bfloat16).denoiser
    types = [{key: t.dtype for key, t in d.named_parameters()} for d in (built, loaded)]
    assert types[0] == types[1]
    assert set(types[0].values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("source", ["owner/unknown", "no/such/folder", "missing"])
def test_an_unknown_network_is_refused_with_what_to_do(source: str) -> None:
    with pytest.raises(UserError, match="give a folder with them"):
        skeleton(source, None, torch.float32)


def test_prompts_that_are_not_encoded_yet_have_no_shapes(tmp_path: Path) -> None:
    assert encoded_shapes(tmp_path / "missing") == {} == encoded_shapes(None)
