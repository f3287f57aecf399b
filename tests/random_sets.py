"""Random sets of features and images for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth_images(n: int, seed: int, size: int) -> Tensor:
    """Smooth random colour images, uint8 [n, 3, size, size]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).mul(255).byte()


def write_images(folder: Path, n: int, seed: int, size: int = 48) -> Path:
    """``smooth_images`` as PNG files in a new folder."""
    folder.mkdir()
    for k, image in enumerate(smooth_images(n, seed, size)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")
    return folder
