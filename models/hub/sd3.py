"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): a rectified flow, prompts by two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import ADDED, JOINT, Family, depths, sigma


class StableDiffusion3(Family):
    pipelines = ("StableDiffusion3Pipeline",)
    targets = (*JOINT, *ADDED)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return depths("transformer_blocks", self.network["num_layers"])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = network(
            hidden_states=x_t, timestep=sigma(t, x_t, 1000), encoder_hidden_states=condition["prompt"],
            pooled_projections=condition["pooled"], return_dict=False,
        )[0]  # fmt: skip
        return out

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["joint_attention_dim"]), "pooled": (self.network["pooled_projection_dim"],)}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        said = list(prompts)
        if pipeline.transformer is None:  # without T5 the pipeline asks its transformer's config for T5's width
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self.network))
        prompt, _, pooled, _ = pipeline.encode_prompt(said, None, None, do_classifier_free_guidance=False)
        return {"prompt": prompt, "pooled": pooled}

    def comfyui(self, path: str) -> str:
        return f"transformer.{path}"
