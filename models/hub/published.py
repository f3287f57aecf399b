"""Denoisers of published pipelines, by hub id: enough to plan a run before anything is downloaded.

The settings are those of the ``config.json`` that each pipeline publishes; what is not named has the default of
diffusers' class, which is that of the published model too. ``tests/models/test_skeleton.py`` compares the numbers of
parameters with the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A pipeline's class, its denoiser's class and the denoiser's settings; ``boundaries`` if it has several of them
    (``denoiser.Routed``)."""

    pipeline: str
    network: str
    settings: Mapping[str, Any]
    boundaries: tuple[float, ...] = ()


PUBLISHED: dict[str, Published] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        "StableDiffusionPipeline", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        "StableDiffusionXLPipeline", "UNet2DConditionModel", {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": Published(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "PixArt-alpha/PixArt-XL-2-512x512": Published(
        "PixArtAlphaPipeline", "PixArtTransformer2DModel", {"sample_size": 64, "caption_channels": 4096}
    ),
    "black-forest-labs/FLUX.1-dev": Published("FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen/Qwen-Image": Published("QwenImagePipeline", "QwenImageTransformer2DModel", {}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(
        "WanPipeline", "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published("WanPipeline", "WanTransformer3DModel", {}),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Published("WanPipeline", "WanTransformer3DModel", {}, (0.875, 0.0)),
}  # fmt: skip
