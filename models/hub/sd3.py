"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): a rectified flow, prompts from two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import ADDED_ATTENTION, JOINT_ATTENTION, Family, flow_timestep, layers_at_depths


class StableDiffusion3(Family):
    pipelines = ("StableDiffusion3Pipeline",)
    lora_targets = (*JOINT_ATTENTION, *ADDED_ATTENTION)
    comfyui_shift = "ModelSamplingSD3"
    prompt_tokens = 333  # 77 of CLIP and 256 of T5

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return layers_at_depths("transformer_blocks", self.network["num_layers"])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = network(
            hidden_states=x_t, timestep=flow_timestep(t, x_t, 1000), encoder_hidden_states=condition["prompt"],
            pooled_projections=condition["pooled"], return_dict=False,
        )[0]  # fmt: skip
        return out

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["joint_attention_dim"]), "pooled": (self.network["pooled_projection_dim"],)}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        if pipeline.transformer is None:  # without T5 the pipeline gets T5's width from its transformer's config
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self.network))
        prompt, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
        return {"prompt": prompt, "pooled": pooled}

    def comfyui(self, path: str) -> str:
        return f"transformer.{path}"
