"""The interface of a family of diffusers pipelines: how its denoiser is called, and how it encodes and decodes.

A family is a file in this folder with a subclass of ``Family``. Weights and noise schedule come from the pipeline's
folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.registry import Registry
from fewstep.core.transfer import send
from fewstep.models import hub
from fewstep.models.backbone import Backbone
from fewstep.models.condition import Condition

Settings = Mapping[str, Any]
JOINT_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")  # of joint attention, on image tokens
ADDED_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")  # on prompt tokens


class Family(ABC):
    """A family, configured with the ``config.json`` of a pipeline's denoiser (``network``) and VAE.

    ``pipelines`` are the supported classes, ``part`` is the denoiser's name in them, ``lora_targets`` are the linear
    layers that LoRA adapts, named as in PEFT. ``classes`` are the pipeline and network classes that diffusers does not
    have, by name. The others describe the pipeline for exports. ``passes_sigmas``: its call passes its scheduler the
    sigmas 1, 1 - 1/n, ... instead of letting it choose. ``loads_lora``: it has ``load_lora_weights``.
    ``guidance_argument`` and ``step_callback``: the arguments of its call for the guidance scale and for a function to
    call after each step. ``guidance_off``: the scale at which it is unguided, 0 in some (Z-Image). ``two_experts``: the
    setting in its index for the boundary between two denoisers, empty if it supports only one. ``comfyui_shift``:
    the node that sets the shift of a flow in ComfyUI. ``prompt_tokens``: the length of an encoded prompt, for planning
    memory.
    """

    pipelines: ClassVar[tuple[str, ...]]
    part: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    passes_sigmas: ClassVar[bool] = False
    loads_lora: ClassVar[bool] = True
    guidance_argument: ClassVar[str] = "guidance_scale"
    guidance_off: ClassVar[float] = 1.0
    classes: ClassVar[Mapping[str, type]] = {}
    two_experts: ClassVar[str] = ""
    step_callback: ClassVar[str] = "callback_on_step_end"
    comfyui_shift: ClassVar[str] = "ModelSamplingAuraFlow"
    prompt_tokens: ClassVar[int] = 512

    def __init__(self, network: Settings, vae: Settings) -> None:
        self.network = network
        self.vae = vae

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale, as ``condition["guidance"]``, and is evaluated once."""
        return False

    @property
    @abstractmethod
    def feature_layers(self) -> tuple[str, ...]:
        """Modules whose outputs a discriminator uses by default: about a quarter, half and three quarters deep."""

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output for latents ``x_t`` [B, C, ...] at times ``t`` [B], float64, in the shape of ``x_t``."""

    def shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        """The latent shape [C, h, w] or [C, F, h, w] of an image or video in pixels. Raises ``UserError`` if the model
        does not support the size."""
        patch = int(self.network.get("patch_size", 1))
        rows, columns = latent_size(height, width, patch * self.factor)
        return self.network["in_channels"], patch * rows, patch * columns

    @property
    @abstractmethod
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the condition's tensors, without the batch axis, for a prompt of eight tokens."""

    @abstractmethod
    def encode(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition's tensors [N, ...] from the text encoders of ``pipeline``; ``""`` gives the null condition."""

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] or videos [B, 3, F, H, W] in [-1, 1], decoded by the VAE of ``pipeline``."""
        vae = pipeline.vae
        scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return vae.decode(scaled, return_dict=False)[0].float()  # type: ignore[no-any-return]

    def encode_images(self, pipeline: Any, images: Tensor) -> Tensor:
        """Latents of images [B, 3, H, W] or videos [B, 3, F, H, W] in [-1, 1]: the mode of the VAE's posterior, scaled
        as ``decode`` expects."""
        vae = pipeline.vae
        mode = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        z: Tensor = (mode - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
        return z.float()

    @property
    def default_size(self) -> tuple[int, int, int]:
        """Height and width in pixels and number of frames that the model was trained for."""
        side = self.factor * int(self.network["sample_size"])
        return side, side, 1

    @property
    def factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return int(2 ** (len(self.vae.get("block_out_channels", (0,) * 4)) - 1))

    def comfyui(self, path: str) -> str:
        """The key of ComfyUI (and kohya's scripts) for the LoRA of the denoiser's layer ``path``."""
        return f"lora_{self.part}_{path.replace('.', '_')}"

    def postprocess_guidance(self, cond: Tensor, out: Tensor) -> Tensor:
        """The pipeline's post-processing of a guided output [B, ...]; none by default."""
        return out


class PackedLatents(Family):
    """A family whose transformer takes 2 x 2 latents as one token, with joint attention to the prompt's tokens."""

    passes_sigmas = True
    lora_targets = (*JOINT_ATTENTION, *ADDED_ATTENTION)

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return layers_at_depths("transformer_blocks", self.network["num_layers"])

    @property
    def default_size(self) -> tuple[int, int, int]:
        return 1024, 1024, 1

    def shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        rows, columns = latent_size(height, width, 2 * self.factor)
        return self.network["in_channels"] // 4, 2 * rows, 2 * columns


class HubBackbone(Backbone):
    """A diffusers denoiser as a backbone ``(x_t, t, condition) -> tensor``."""

    def __init__(self, family: Family, network: nn.Module) -> None:
        super().__init__()
        self.family = family
        self.network: Any = network

    @property
    def lora_targets(self) -> Sequence[str]:  # type: ignore[override]
        return self.family.lora_targets

    @property
    def feature_layers(self) -> Sequence[str]:  # type: ignore[override]
        return [f"network.{path}" for path in self.family.feature_layers]

    @property
    def repeated_blocks(self) -> Sequence[str]:  # type: ignore[override]
        return self.network._repeated_blocks or ()  # the attribute by which diffusers compiles regions, too

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        self.network.enable_gradient_checkpointing(function)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype  # diffusers': that of the parameters that may be other than float32
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        return self.family.predict(self.network, x_t.to(dtype), t, Condition(cast))


@cache
def families() -> dict[str, type[Family]]:
    """fewstep's own families by file name."""
    found: dict[str, type[Family]] = {}
    for file in pkgutil.iter_modules(hub.__path__):
        module = importlib.import_module(f"fewstep.models.hub.{file.name}")
        for content in vars(module).values():
            own = isinstance(content, type) and content.__module__ == module.__name__
            if own and issubclass(content, Family) and "pipelines" in vars(content):
                found[file.name] = content
    return found


FAMILIES: Registry[type[Family]] = Registry(
    "family", families, lambda value: isinstance(value, type) and issubclass(value, Family), "a subclass of Family"
)


def family_of(pipeline: str) -> type[Family]:
    """The family of a pipeline class by name: fewstep's own, registered and installed ones.

    Raises ``UserError`` that lists the supported classes, and if two families support one.
    """
    found: dict[str, tuple[str, type[Family]]] = {}
    for name in FAMILIES.names():
        family = FAMILIES.resolve(name)
        for supported in family.pipelines:
            other, owner = found.setdefault(supported, (name, family))
            if owner is not family:
                raise UserError(
                    f"The families {other!r} and {name!r} both support the pipeline class {supported!r}; remove one."
                )
    if pipeline not in found:
        raise UserError(
            f"Pipelines of class {pipeline!r} are not supported; supported: {', '.join(sorted(found))}. "
            "A family of your own can be registered: see docs/own_modules.md."
        )
    return found[pipeline][1]


def discrete_timestep(t: Tensor, x: Tensor, steps: int = 1000) -> Tensor:
    """The timesteps [B] in [0, steps - 1] of a discrete schedule at times ``t`` [B]: float32 on the device of ``x``."""
    return send((steps * t - 1).clamp(min=0).float(), x.device)


def flow_timestep(t: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """The timesteps [B] of a flow, ``scale * t``: float32 on the device of ``x``."""
    return send((scale * t).float(), x.device)


def pack_latents(x: Tensor) -> Tensor:
    """Packs latents [B, C, h, w] into tokens [B, h/2 * w/2, 4 C], channel-major (FLUX, Qwen-Image)."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack_latents(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``pack_latents``, for latents of ``shape`` [B, C, h, w]."""
    b, c, h, w = shape
    return tokens.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def layers_at_depths(path: str, count: int) -> tuple[str, ...]:
    """The paths of the blocks at a quarter, half and three quarters of the ``count`` blocks in ``path``."""
    return tuple(dict.fromkeys(f"{path}.{min(count - 1, round(count * share))}" for share in (0.25, 0.5, 0.75)))


def pad_rows(rows: Tensor, length: int) -> Tensor:
    """Pads [N, L, ...] with zeros to [N, length, ...]."""
    return torch.cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], 1)


def latent_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width in units of ``factor`` pixels. Raises ``UserError`` if they are not multiples of it."""
    if height % factor or width % factor:
        raise UserError(f"{height} x {width} pixels: height and width must be multiples of {factor} for this model.")
    return height // factor, width // factor
