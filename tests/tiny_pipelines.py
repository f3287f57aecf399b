"""Tiny random pipelines of every family, built from diffusers' own classes and saved like a user's folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.files import write_tensors, write_text
from fewstep.models.hub.encoded import Index, fingerprint
from fewstep.models.hub.folder import PipelineFolder

WIDTH = 32  # of prompt embeddings, except SDXL's
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def fill(module: Any, seed: int = 0) -> Any:
    """Random weights in every parameter, also in zero-initialised and uninitialised ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data += 0.5
    return module.eval()


def clip(projection: bool = False) -> tuple[Any, Any]:
    """A tokenizer of letters and a CLIP text encoder."""
    import tempfile

    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: k for k, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return tokenizer, fill((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5() -> tuple[Any, Any]:
    """A tokenizer of letters and a T5 encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return tokenizer, fill(T5EncoderModel(config))


def image_vae(channels: int = 4, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32), latent_channels=channels, norm_num_groups=8, **settings,
    )  # fmt: skip
    return fill(vae)


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)


def stable_diffusion(prediction: str = "epsilon", widths: tuple[int, int] = (32, 64), cls: Any = None) -> Any:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=widths, norm_num_groups=8, cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    tokenizer, encoder = clip()
    scheduler = ddim()
    scheduler.register_to_config(prediction_type=prediction)
    return (cls or StableDiffusionPipeline)(
        unet=fill(unet), scheduler=scheduler, vae=image_vae(), text_encoder=encoder, tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_2() -> Any:
    return stable_diffusion("v_prediction")


def sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=2 * WIDTH, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=WIDTH + 48,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(), clip(projection=True)
    return StableDiffusionXLPipeline(
        unet=fill(unet), scheduler=ddim(), vae=image_vae(), text_encoder=encoder, tokenizer=tokenizer,
        text_encoder_2=encoder_2, tokenizer_2=tokenizer_2, add_watermarker=False,
    )  # fmt: skip


def pixart() -> Any:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=WIDTH, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    tokenizer, encoder = t5()
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, steps_offset=1)
    return PixArtAlphaPipeline(
        transformer=fill(transformer), scheduler=scheduler, vae=image_vae(), text_encoder=encoder, tokenizer=tokenizer
    )


def flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4,
        attention_head_dim=8, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )  # fmt: skip
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(projection=True), clip(projection=True)
    return StableDiffusion3Pipeline(
        transformer=fill(transformer), scheduler=flow(shift=3.0),
        vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609), text_encoder=encoder, tokenizer=tokenizer,
        text_encoder_2=encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux(guidance: bool = True) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(), t5()
    return FluxPipeline(
        transformer=fill(transformer), scheduler=flow(), text_encoder=encoder, tokenizer=tokenizer,
        vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159), text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
    )  # fmt: skip


def flux_schnell() -> Any:
    return flux(guidance=False)


def qwen_image() -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 1.5, 0.5],
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=fill(transformer), scheduler=flow(), vae=fill(vae), text_encoder=None, tokenizer=None
    )


def wan(vae: dict[str, Any] | None = None, **settings: Any) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 1.5, 0.5], **(vae or {}),
    )  # fmt: skip
    return WanPipeline(
        transformer=fill(transformer), scheduler=flow(), vae=fill(autoencoder), text_encoder=None, tokenizer=None,
        **settings,
    )  # fmt: skip


def wan_5b() -> Any:
    """Wan 2.2 TI2V-5B: its VAE packs 2 x 2 pixels, so that a latent is 16 pixels wide; a time per token."""
    packing = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "scale_factor_spatial": 16}
    return wan(packing, expand_timesteps=True)


def wan_2_2() -> Any:
    """Wan 2.2 A14B: two experts, for times above and below the boundary."""
    two = wan(boundary_ratio=0.8)
    other = copy.deepcopy(two.transformer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    two.register_modules(transformer_2=other)
    return two


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny pipeline, its size in pixels, and the random embeddings that its call accepts."""

    build: Callable[[], Any]
    size: tuple[int, int, int]  # height, width, frames
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the condition, without the batch axis
    arguments: dict[str, str] = field(default_factory=dict)  # the call's names, by the condition's
    scale: str = "guidance_scale"
    negatives: bool = True

    def embeddings(self, n: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.ones(n, *shape, dtype=torch.int64)
            if name == "mask"
            else torch.randn(n, *shape, generator=generator)
            for name, shape in self.tensors.items()
        }


PROMPT, POOLED, MASK = (
    {"prompt": "prompt_embeds"},
    {"pooled": "pooled_prompt_embeds"},
    {"mask": "prompt_attention_mask"},
)
TINY: dict[str, Tiny] = {
    "sd": Tiny(stable_diffusion, (16, 16, 1), {"prompt": (5, WIDTH)}, PROMPT),
    "sd2": Tiny(stable_diffusion_2, (16, 16, 1), {"prompt": (5, WIDTH)}, PROMPT),
    "sdxl": Tiny(sdxl, (16, 16, 1), {"prompt": (5, 2 * WIDTH), "pooled": (WIDTH,)}, PROMPT | POOLED),
    "pixart": Tiny(pixart, (16, 16, 1), {"prompt": (5, WIDTH), "mask": (5,)}, PROMPT | MASK),
    "sd3": Tiny(sd3, (16, 16, 1), {"prompt": (5, WIDTH), "pooled": (2 * WIDTH,)}, PROMPT | POOLED),
    "flux": Tiny(flux, (16, 32, 1), {"prompt": (5, WIDTH), "pooled": (WIDTH,)}, PROMPT | POOLED, negatives=False),
    "flux_schnell": Tiny(
        flux_schnell, (16, 16, 1), {"prompt": (5, WIDTH), "pooled": (WIDTH,)}, PROMPT | POOLED, scale="true_cfg_scale"
    ),
    "qwen_image": Tiny(
        qwen_image, (32, 64, 1), {"prompt": (5, WIDTH), "mask": (5,)}, PROMPT | {"mask": "prompt_embeds_mask"},
        scale="true_cfg_scale",
    ),
    "wan": Tiny(wan, (32, 32, 9), {"prompt": (5, WIDTH)}, PROMPT),
    "wan_2_2": Tiny(wan_2_2, (32, 32, 9), {"prompt": (5, WIDTH)}, PROMPT),
    "wan_5b": Tiny(wan_5b, (64, 96, 5), {"prompt": (5, WIDTH)}, PROMPT),
}  # fmt: skip


N, STEPS = 2, 4
ADAPTERS = {"rank": 2}


def nodes(pipeline: Any) -> list[float]:
    """The times of the pipeline's last run, from its scheduler."""
    scheduler = pipeline.scheduler
    if type(scheduler).__name__ == "DDIMScheduler":
        return [(int(t) + 1) / 1000 for t in scheduler.timesteps] + [0.0]
    return [float(sigma) for sigma in scheduler.sigmas]


def packed(pipeline: Any, latents: Tensor) -> Tensor:
    """Latents in the pipeline's own layout."""
    if type(pipeline).__name__ not in ("FluxPipeline", "QwenImagePipeline"):
        return latents
    return pipeline._pack_latents(latents, *latents.shape)


def inputs(tiny: Tiny, folder: PipelineFolder, pipeline: Any) -> tuple[Tensor, dict[str, Any]]:
    """Initial noise [N, ...], and the arguments for it of a call of the pipeline."""
    height, width, frames = tiny.size
    noise = torch.randn(N, *folder.family.shape(height, width, frames), generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"height": height, "width": width, "latents": packed(pipeline, noise)}
    if type(pipeline).__name__.startswith("PixArt"):
        arguments["use_resolution_binning"] = False
    if frames > 1:
        arguments["num_frames"] = frames
    return noise, arguments


def called(tiny: Tiny, folder: PipelineFolder, pipeline: Any, scale: float, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The initial noise [N, ...] of a call of the pipeline, and its output."""
    noise, own = inputs(tiny, folder, pipeline)
    out = pipeline(num_inference_steps=STEPS, **own, **arguments, **{tiny.scale: scale})
    return noise, torch.as_tensor(out[0])


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def settings(folder: Path, name: str, out: Path, adapters: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    rate = {"lr": 1e-3}
    stage = {"steps": 2, "objective": {"name": "tdm", "steps": 2}, "roles": {"student": rate, "fake": rate}}
    return {
        "out": str(out), "teacher": str(folder), "size": TINY[name].size, "adapters": adapters, "batch": 2,
        "log_every": 1, "data": {"kind": "prompts", "path": str(folder / "prompts")},
        "health": {"every": 2, "conditions": 2, "seeds": 2, "teacher_steps": 2}, "stages": [stage], **changes,
    }  # fmt: skip


def write_embeddings(name: str, folder: Path) -> None:
    """``prompts/`` of random embeddings in a pipeline's folder, in the layout of ``fewstep data encode``."""
    prompts, opened = folder / "prompts", PipelineFolder.open(folder)
    prompts.mkdir()
    write_tensors(TINY[name].embeddings(8, 1), prompts / "shard-00000.safetensors")
    write_tensors(TINY[name].embeddings(1, 2), prompts / "null.safetensors")
    index = Index(pipeline=opened.index["_class_name"], encoders=fingerprint(opened), prompts="", count=8, rows=8)
    write_text(index.model_dump_json(), prompts / "index.json")
