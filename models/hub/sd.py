"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752): a U-Net on latents, prompts from CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import Family, discrete_timestep


class StableDiffusion(Family):
    pipelines = ("StableDiffusionPipeline",)
    part = "unet"
    prompt_tokens = 77

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return ("mid_block",)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prompt = condition["prompt"]
        out: Tensor = network(x_t, discrete_timestep(t, x_t), encoder_hidden_states=prompt, return_dict=False)[0]
        return out

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["cross_attention_dim"])}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"prompt": pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)[0]}
