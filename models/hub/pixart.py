"""PixArt-alpha and PixArt-Sigma (Chen et al., arXiv 2310.00426, 2403.04692): a transformer, prompts from T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.family import Family, discrete_timestep, layers_at_depths


class PixArt(Family):
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    loads_lora = False
    prompt_tokens = 120
    step_callback = "callback"

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return layers_at_depths("transformer_blocks", self.network["num_layers"])

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.get("use_additional_conditions") or self.network["sample_size"] == 128:
            height, width = (self.factor * n for n in x_t.shape[-2:])
            columns = [x_t.new_full((len(x_t), 1), n) for n in (height, width, height / width)]  # nothing is sent
            added["resolution"], added["aspect_ratio"] = torch.cat(columns[:2], 1), columns[2]
        out: Tensor = network(
            x_t, encoder_hidden_states=condition["prompt"], timestep=discrete_timestep(t, x_t), added_cond_kwargs=added,
            encoder_attention_mask=condition["mask"], return_dict=False,
        )[0]  # fmt: skip
        return out[:, : x_t.shape[1]]  # the other channels are a learned variance

    def comfyui(self, path: str) -> str:
        return f"transformer.{path}"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt": (8, self.network["caption_channels"]), "mask": (8,)}

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        length = 300 if type(pipeline).__name__ == "PixArtSigmaPipeline" else 120
        prompt, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt": prompt, "mask": mask.to(torch.int64)}
