"""Two tiny random diffusers pipelines on disk, and wrappers that turn their networks into backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.prediction import Kind
from fewstep.models.schedules import NoiseSchedule, RectifiedFlow, VPDiscrete

PROMPT = (5, 32)  # tokens and width of the prompt embeddings
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class StableDiffusion(nn.Module):
    """Latents [B, 4, h, w], prompt embeddings [B, L, D] -> noise; the timestep of time t is 1000 t - 1."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.network = unet

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        timestep = (1000 * t - 1).to(x_t)
        return self.network(x_t, timestep, encoder_hidden_states=condition["prompt"], return_dict=False)[0]


class Wan(nn.Module):
    """Latents [B, 16, F, h, w], prompt embeddings [B, L, D] -> velocity; the timestep of time t is 1000 t."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.network = transformer

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(x_t, (1000 * t).to(x_t), condition["prompt"], return_dict=False)[0]


@dataclass(frozen=True)
class Family:
    """A pipeline folder and how its network is called; ``network()`` loads a new one."""

    folder: Path
    wrapper: Callable[[nn.Module], nn.Module]
    part: str
    schedule: NoiseSchedule
    kind: Kind
    shape: tuple[int, ...]

    def network(self) -> nn.Module:
        from diffusers import DiffusionPipeline

        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        return self.wrapper(getattr(DiffusionPipeline.from_pretrained(self.folder, **absent), self.part))

    def denoiser(self, backbone: nn.Module) -> Denoiser:
        return Denoiser(backbone, self.schedule, self.kind)

    def prompts(self, random: KeyedRandom, size: int) -> Batch:
        condition = Condition({"prompt": random.normal((size, *PROMPT))}, {"prompt": torch.zeros(PROMPT)})
        return Batch(size, self.shape, condition)


def stable_diffusion(folder: Path) -> Family:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=PROMPT[1],
        attention_head_dim=8,
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(unet=unet, scheduler=scheduler, **parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return Family(folder, StableDiffusion, "unet", VPDiscrete.scaled_linear(), "noise", (4, 8, 8))


def wan(folder: Path) -> Family:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=PROMPT[1],
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipeline = WanPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.save_pretrained(folder)
    return Family(folder, Wan, "transformer", RectifiedFlow(), "velocity", (16, 3, 4, 4))
