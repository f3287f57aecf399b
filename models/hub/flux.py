"""FLUX.1 (Black Forest Labs, 2024): a rectified flow on packed latents; the dev model embeds its guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import PackedLatents, flow_timestep, pack_latents, unpack_latents


class Flux(PackedLatents):
    pipelines = ("FluxPipeline",)

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.network["guidance_embeds"])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prompt = condition["prompt"]
        rows, columns = (n // 2 for n in x_t.shape[-2:])
        positions = torch.zeros(rows, columns, 3, device=x_t.device, dtype=x_t.dtype)
        positions[..., 1] += torch.arange(rows, device=x_t.device)[:, None]
        positions[..., 2] += torch.arange(columns, device=x_t.device)
        out: Tensor = network(
            hidden_states=pack_latents(x_t), timestep=flow_timestep(t, x_t), guidance=condition.get("guidance"),
            pooled_projections=condition["pooled"], encoder_hidden_states=prompt, img_ids=positions.flatten(0, 1),
            txt_ids=positions.new_zeros(prompt.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
        return unpack_latents(out, x_t.shape)

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["joint_attention_dim"]), "pooled": (self.network["pooled_projection_dim"],)}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        prompt, pooled, _ = pipeline.encode_prompt(list(prompts), None)
        return {"prompt": prompt, "pooled": pooled}
