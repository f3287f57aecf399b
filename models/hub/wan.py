"""Wan 2.1 and 2.2, text to video (Wan team, arXiv 2503.20314): a rectified flow, prompts from UMT5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.hub.family import Family, flow_timestep, latent_size, layers_at_depths

ORIGINAL = (  # diffusers' names of layers, and those of Wan's own code
    ("attn1.to_out.0", "self_attn.o"), ("attn1.to_", "self_attn."), ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.to_", "cross_attn."), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
)  # fmt: skip


class Wan(Family):
    pipelines = ("WanPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    two_experts = "boundary_ratio"
    comfyui_shift = "ModelSamplingSD3"

    @property
    def factor(self) -> int:
        return int(self.vae.get("scale_factor_spatial", 8))

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return layers_at_depths("blocks", self.network["num_layers"])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = network(x_t, flow_timestep(t, x_t, 1000), condition["prompt"], return_dict=False)[0]
        return out

    @property
    def default_size(self) -> tuple[int, int, int]:
        return (704, 1280, 121) if self.factor == 16 else (480, 832, 81)  # 16: Wan 2.2 TI2V-5B

    def shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        every = int(self.vae.get("scale_factor_temporal", 4))
        if (frames - 1) % every:
            raise UserError(f"{frames} frames: this model needs a multiple of {every} plus 1.")
        patch = int(self.network.get("patch_size", (1, 2, 2))[-1])
        rows, columns = latent_size(height, width, patch * self.factor)
        return self.network["in_channels"], (frames - 1) // every + 1, patch * rows, patch * columns

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["text_dim"])}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        prompt, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=512)
        return {"prompt": prompt}

    def comfyui(self, path: str) -> str:
        for ours, theirs in ORIGINAL:
            path = path.replace(ours, theirs)
        return f"diffusion_model.{path}"

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        return decode_normalized(pipeline, latents)

    def encode_images(self, pipeline: Any, images: Tensor) -> Tensor:
        return encode_normalized(pipeline, images)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel [1, C, 1, 1, 1]."""
    values = (torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    mean, std = (v.to(vae.device, vae.dtype) for v in values)
    return mean, std


def decode_normalized(pipeline: Any, latents: Tensor) -> Tensor:
    """Decodes latents whose channels were normalized with the mean and standard deviation in the VAE's config."""
    vae = pipeline.vae
    mean, std = _statistics(vae)
    return vae.decode(latents.to(mean) * std + mean, return_dict=False)[0].float()  # type: ignore[no-any-return]


def encode_normalized(pipeline: Any, videos: Tensor) -> Tensor:
    """The inverse of ``decode_normalized``: the mode of the VAE's posterior, normalized."""
    vae = pipeline.vae
    mean, std = _statistics(vae)
    return ((vae.encode(videos.to(mean)).latent_dist.mode() - mean) / std).float()  # type: ignore[no-any-return]
