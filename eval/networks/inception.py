"""Inception-V3, the network of the FID, in clean-fid's three modes (Parmar et al., arXiv 2104.11222).

``clean`` resizes with an antialiased bicubic filter without rounding, ``legacy_pytorch`` is pytorch-fid (bilinear, not
antialiased), ``legacy_tensorflow`` is the original's and EDM's (the network resizes). They differ by tenths of FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fewstep.core.errors import UserError, nearest
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.networks.weights import LoadedWeights, WeightsLocator, hub_cache, reading_weights, temporary_folder

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Mode = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]
SCRIPT = "inception-2015-12-05.pt"
SCRIPT_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{SCRIPT}"
PORT = "pt_inception-2015-12-05-6726825d.pth"
PORT_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PORT}"
SIDE = 299


@dataclass(frozen=True)
class Inception(LoadedWeights):
    """The 2048 pool features."""

    mode: Mode
    dimension: int = 2048

    @classmethod
    def load(cls, mode: str, locator: WeightsLocator, device: torch.device | str = "cpu") -> Inception:
        """Raises ``UserError`` if the weights are missing or belong to another network."""
        if mode not in get_args(Mode):
            raise UserError(f"Unknown mode of Inception {mode!r}{nearest(mode, get_args(Mode))}.")
        port = mode == "legacy_pytorch"
        if port:
            file = locator.find(PORT, PORT_URL, [hub_cache()])
        else:
            file = locator.find(SCRIPT, SCRIPT_URL, [temporary_folder()])
        with reading_weights(file, "Inception-V3"):
            network = load_port(file) if port else torch.jit.load(file)
        return cls.from_file(file, network, device, mode=mode)

    @property
    def name(self) -> str:
        return f"inception_{self.mode}"

    def prepare(self, image: Tensor) -> Tensor:
        if self.mode == "clean":
            return resize_antialiased(image, SIDE)
        if self.mode == "legacy_tensorflow":
            return image
        return F.interpolate(image[None].float(), (SIDE, SIDE), mode="bilinear")[0].clamp(0, 255)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        if self.mode == "clean":
            features: Tensor = self.network.layers((x - 128) / 128)
        elif self.mode == "legacy_tensorflow":
            features = self.network(x, return_features=True)
        else:
            features = self.network(2 * (x / 255) - 1)
        return features.flatten(1)


@dataclass(frozen=True)
class InceptionClasses:
    """Probabilities of Inception's 1008 classes, for the Inception Score (arXiv 1606.03498); without the last layer's
    bias, as in NVIDIA's and OpenAI's code."""

    inception: Inception
    name: str = "inception_classes"
    dimension: int = 1008

    @property
    def sha256(self) -> str:
        return self.inception.sha256

    def prepare(self, image: Tensor) -> Tensor:
        return image

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.inception.device).float()
        probabilities: Tensor = self.inception.network(x, no_output_bias=True)
        return probabilities


@dataclass(frozen=True)
class InceptionPatch:
    """The 2048 pool features of the 299 x 299 pixels at the centre, which no mode resizes: they show details that
    resizing the whole image removes."""

    inception: Inception
    dimension: int = 2048

    @property
    def name(self) -> str:
        return f"{self.inception.name}_patch"

    @property
    def sha256(self) -> str:
        return self.inception.sha256

    def prepare(self, image: Tensor) -> Tensor:
        """Raises ``UserError`` on an image with a side below 299."""
        height, width = image.shape[-2:]
        if min(height, width) < SIDE:
            raise UserError(
                f"A patch of {SIDE} x {SIDE} pixels does not fit into an image of {width} x {height}: patch_fid needs "
                "images of high resolution, without size in the protocol or with a larger one."
            )
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        return self.inception.prepare(image[:, top : top + SIDE, left : left + SIDE])

    def __call__(self, images: Tensor) -> Tensor:
        return self.inception(images)


def resize_antialiased(image: Tensor, side: int) -> Tensor:
    """uint8 [C, H, W] -> float32 [C, side, side] in 0..255: PIL's antialiased bicubic filter on each channel, without
    rounding. Computed as two sparse products, which is faster and equal up to single precision."""
    c, h, w = image.shape
    columns = np.ascontiguousarray(image.numpy().transpose(2, 0, 1), dtype=np.float32)
    resized = (_bicubic(w, side) @ columns.reshape(w, c * h)).reshape(side, c, h)
    resized = (_bicubic(h, side) @ resized.transpose(2, 1, 0).reshape(h, c * side)).reshape(side, c, side)
    out = np.empty((c, side, side), np.float32)
    return torch.from_numpy(np.clip(resized.transpose(1, 0, 2), 0, 255, out=out))


@lru_cache(maxsize=1024)
def _bicubic(n: int, side: int) -> csr_array:
    """PIL's filter for a row of n numbers as a matrix [side, n]: the resized identity matrix."""
    from scipy.sparse import csr_array

    identity = Image.fromarray(np.eye(n, dtype=np.float32))
    return csr_array(np.asarray(identity.resize((side, n), Image.Resampling.BICUBIC)).T)


def load_port(file: Path) -> nn.Module:
    """pytorch-fid's network: torchvision's with the patched blocks that clean-fid ships. Raises what
    ``reading_weights`` turns into a ``UserError`` if the file belongs to another network."""
    torchvision = import_torchvision()
    from cleanfid import inception_pytorch as fid

    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    network.Mixed_5b, network.Mixed_5c, network.Mixed_5d = (
        fid.FIDInceptionA(channels, pool) for channels, pool in ((192, 32), (256, 64), (288, 64))
    )
    network.Mixed_6b, network.Mixed_6c, network.Mixed_6d, network.Mixed_6e = (
        fid.FIDInceptionC(768, channels) for channels in (128, 160, 160, 192)
    )
    network.Mixed_7b, network.Mixed_7c = fid.FIDInceptionE_1(1280), fid.FIDInceptionE_2(2048)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.fc = network.dropout = nn.Identity()
    network.transform_input = False
    result: nn.Module = network
    return result
