"""Qwen-Image (Wu et al., arXiv 2508.02324): packed latents, prompts from a language model, norm-preserving guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import PackedLatents, flow_timestep, pack_latents, pad_rows, unpack_latents
from fewstep.models.hub.wan import decode_normalized, encode_normalized


class QwenImage(PackedLatents):
    pipelines = ("QwenImagePipeline",)
    guidance_argument = "true_cfg_scale"
    tokens = 512  # prompts are padded to this length; the mask marks the actual tokens

    @property
    def factor(self) -> int:
        return int(2 ** len(self.vae.get("temperal_downsample", (0,) * 3)))

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows, columns = (n // 2 for n in x_t.shape[-2:])
        out: Tensor = network(
            hidden_states=pack_latents(x_t), timestep=flow_timestep(t, x_t), guidance=None,
            encoder_hidden_states=condition["prompt"], encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, rows, columns)]] * len(x_t), return_dict=False,
        )[0]  # fmt: skip
        return unpack_latents(out, x_t.shape)

    def comfyui(self, path: str) -> str:
        return f"diffusion_model.{path}"

    def postprocess_guidance(self, cond: Tensor, out: Tensor) -> Tensor:
        """Rescales each token of the guided output to the norm of the conditional one."""
        c, g = pack_latents(cond), pack_latents(out)
        return unpack_latents(g * (c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True)), out.shape)

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["joint_attention_dim"]), "mask": (8,)}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        prompt, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=self.tokens)
        if mask is None:  # the pipeline returns None for a mask of ones
            mask = torch.ones(prompt.shape[:2], device=prompt.device)
        return {"prompt": pad_rows(prompt, self.tokens), "mask": pad_rows(mask, self.tokens).to(torch.int64)}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        return decode_normalized(pipeline, latents[:, :, None])[:, :, 0]

    def encode_images(self, pipeline: Any, images: Tensor) -> Tensor:
        return encode_normalized(pipeline, images[:, :, None])[:, :, 0]
