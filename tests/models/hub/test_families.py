"""The contract of every diffusers family: sampling equals the pipeline's own call, from the same folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import TINY, N, Tiny, called, difference, nodes, packed
from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.hub.folder import PipelineFolder
from fewstep.samplers.ddim import ddim
from fewstep.samplers.predictor import Predictor

pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=list(TINY))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, PipelineFolder, Any]:
    tiny = TINY[request.param]
    path = tmp_path_factory.mktemp(request.param)
    pipeline = tiny.build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return tiny, PipelineFolder.open(path), pipeline


@torch.no_grad()
def sampled(folder: PipelineFolder, pipeline: Any, condition: Condition, noise: Tensor, scale: float) -> Tensor:
    return ddim(Predictor(folder.denoiser(), condition, Guidance(scale)), noise, nodes(pipeline))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_equals_the_pipelines_own(case: tuple[Tiny, PipelineFolder, Any], scale: float) -> None:
    tiny, folder, pipeline = case
    cond, null = tiny.embeddings(N, 1), tiny.embeddings(1, 2)
    arguments = {tiny.arguments[name]: value for name, value in cond.items()}
    if tiny.negatives:
        every = {name: value.expand(N, *value.shape[1:]).contiguous() for name, value in null.items()}
        arguments |= {f"negative_{tiny.arguments[name]}": value for name, value in every.items()}
    if type(pipeline).__name__.startswith("PixArt"):
        arguments["negative_prompt"] = None
    noise, theirs = called(tiny, folder, pipeline, scale, output_type="latent", **arguments)
    ours = sampled(folder, pipeline, Condition(cond, null), noise, scale)
    assert difference(packed(pipeline, ours), theirs) < 1e-4


def test_from_words_to_pixels_equals_the_pipelines_own(case: tuple[Tiny, PipelineFolder, Any]) -> None:
    """Encoding, null condition and decoding, with the folder's text encoders and VAE."""
    tiny, folder, pipeline = case
    family, words, scale = folder.family, ["a cat", "two dogs"], 3.0
    parts = folder.pipeline()
    if folder.has_component("text_encoder"):
        with torch.no_grad():
            cond, null = family.encode(parts, words), family.encode(parts, [""])
        negative = {"negative_prompt": ["", ""]} if family.pipelines == ("FluxPipeline",) and tiny.negatives else {}
        arguments: dict[str, Any] = {"prompt": words, **negative}
    else:
        cond, null = tiny.embeddings(N, 1), tiny.embeddings(1, 2)
        arguments = {tiny.arguments[name]: value for name, value in cond.items()}
        every = {name: value.expand(N, *value.shape[1:]).contiguous() for name, value in null.items()}
        arguments |= {f"negative_{tiny.arguments[name]}": value for name, value in every.items()}
    noise, theirs = called(tiny, folder, pipeline, scale, output_type="pt", **arguments)
    latents = sampled(folder, pipeline, Condition(cond, null), noise, scale)
    with torch.no_grad():
        pixels = (family.decode(parts, latents) / 2 + 0.5).clamp(0, 1)
    if pixels.ndim == 5:
        theirs = theirs.transpose(1, 2)  # frames before channels
    assert difference(pixels, theirs) < 1e-3


def test_encoded_images_have_the_latent_shape_and_scale(case: tuple[Tiny, PipelineFolder, Any]) -> None:
    """The scaling of ``encode_images`` and that of ``decode`` must cancel, although random weights do not reconstruct
    the image."""
    tiny, folder, _ = case
    height, width, frames = tiny.size
    parts = folder.pipeline()
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, frames, height, width) if frames > 1 else (1, 3, height, width)
    images = torch.rand(shape, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = folder.family.encode_images(parts, images)
        assert latents.shape[1:] == folder.family.shape(height, width, frames)
        posterior = parts.vae.encode(images if latents.ndim == 5 or folder.family.factor == 2 else images[:, :, None])
        decoded = parts.vae.decode(posterior.latent_dist.mode())[0]
        ours = folder.family.decode(parts, latents)
    assert difference(ours, decoded.reshape(ours.shape)) < 1e-3


def test_feature_layers_and_lora_targets_exist_in_the_network(case: tuple[Tiny, PipelineFolder, Any]) -> None:
    _, folder, _ = case
    family = folder.family
    network = folder.denoiser(None, family.feature_layers, folder.path / family.part).backbone.network
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert family.feature_layers
    for target in family.lora_targets:
        assert any(name == target or name.endswith(f".{target}") for name in names), target
