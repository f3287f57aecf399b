"""Stable Diffusion XL (Podell et al., arXiv 2307.01952): two text encoders, conditioned on the image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import discrete_timestep
from fewstep.models.hub.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    pipelines = ("StableDiffusionXLPipeline",)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": self.time_ids(x_t)}
        prompt = condition["prompt"]
        out: Tensor = network(
            x_t, discrete_timestep(t, x_t), encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False
        )[0]
        return out

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["cross_attention_dim"]), "pooled": (self._pooled,)}

    @property
    def _pooled(self) -> int:
        return int(self.network["projection_class_embeddings_input_dim"] - 6 * self.network["addition_time_embed_dim"])

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        prompt, _, pooled, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:  # then the pipeline's null condition is zero
            nonempty = torch.tensor([bool(text) for text in prompts], device=prompt.device)
            prompt, pooled = prompt * nonempty[:, None, None], pooled * nonempty[:, None]
        return {"prompt": prompt, "pooled": pooled}

    def time_ids(self, x_t: Tensor) -> Tensor:
        """Original size, crop and target size [B, 6] of an uncropped image of the latents' size."""
        size = [self.factor * n for n in x_t.shape[-2:]]
        return torch.stack([x_t.new_full((len(x_t),), n) for n in (*size, 0, 0, *size)], 1)  # nothing is sent
