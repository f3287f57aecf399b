"""The small classifier whose features a reference uses instead of Inception's, so that nothing must be downloaded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewstep.core.files import reading, write_tensors, write_text
from fewstep.models.loading import load_weights

WEIGHTS = "classifier.safetensors"
CONFIG = "classifier.json"
MAX_WIDTH, MAX_CLASSES = 4_096, 65_536
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Widths = tuple[Width, Width, Width, Width]


class Classifier(nn.Module):
    """Four convolutions (two at half, two at a quarter of the resolution), the mean over positions, two linear layers.

    It takes uint8 images [B, C, H, W], so that no caller can scale them differently.
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, widths: Widths = (32, 48, 96, 96), dimension: int = 64
    ) -> None:
        super().__init__()
        a, b, c, d = widths
        self.convolutions = nn.Sequential(
            *_block(channels, a, 5, 2), *_block(a, b, 3), nn.MaxPool2d(2), *_block(b, c, 3), *_block(c, d, 3)
        )
        # standardised: each feature has mean 0 and variance 1 over the training images
        self.penultimate = nn.Sequential(nn.Linear(d, dimension, bias=False), nn.BatchNorm1d(dimension, affine=False))
        self.head = nn.Linear(dimension, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def dimension(self) -> int:
        return self.head.in_features

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, dimension], before the activation, so not saturated."""
        x = images.float() / 255  # black is 0, as is the padding of the convolutions
        features: Tensor = self.penultimate(self.convolutions(x).mean(dim=(2, 3)))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """[B, dimension] -> logits [B, classes]."""
        logits: Tensor = self.head(F.silu(features))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> logits [B, classes]."""
        return self.classify(self.features(images))


def _block(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.SiLU()


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    classes: int | None = None,
    widths: Widths = (32, 48, 96, 96),
    batch: int = 128,
    lr: float = 4e-3,
    weight_decay: float = 0.05,
    shift: int = 1,
    progress: Callable[[int, int, float], None] | None = None,
) -> Classifier:
    """Trains with cross-entropy and AdamW over one learning-rate cycle (Smith & Topin, arXiv 1708.07120). Images are
    shifted by up to ``shift`` pixels, so that features of training and of other images agree.

    ``images``, uint8 [N, C, H, W], and ``labels``, int64 [N], are on the training device. The result depends only on
    the arguments: the global random state is neither used nor changed. There are as many outputs as ``classes``, by
    default as the labels number. ``progress(step, steps, loss)`` is called after each step. Returns the network in eval
    mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1], classes or int(labels.max()) + 1, widths).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    batches = -(-len(images) // batch)
    steps = epochs * batches
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    # batches of nearly equal size: batch normalisation cannot use a last batch of a single image
    shuffled = (torch.randperm(len(images), generator=generator).tensor_split(batches) for _ in range(epochs))
    for step, rows in enumerate(chain.from_iterable(shuffled), start=1):
        rows = rows.to(images.device)
        loss = F.cross_entropy(network(_shift_randomly(images[rows], shift, generator)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if progress:
            progress(step, steps, loss.item())
    return network.eval()


def _shift_randomly(images: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by -limit..limit pixels along both axes, padded with black."""
    b, _, h, w = images.shape
    down, right = torch.randint(2 * limit + 1, (2, b, 1), generator=generator).to(images.device)
    rows, columns = (down + torch.arange(h, device=images.device), right + torch.arange(w, device=images.device))
    sample = torch.arange(b, device=images.device)[:, None, None]
    shifted = F.pad(images, [limit] * 4)[sample, :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """The share (0..1) of images, uint8 [N, C, H, W], whose largest logit is that of their label, int64 [N]."""
    correct = sum(
        int((network(x.to(network.device)).argmax(dim=1).cpu() == y.cpu()).sum())
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return correct / len(images)


class ClassifierConfig(BaseModel):
    """``classifier.json``: the network, the ``shape`` [C, H, W] of its images, and a record of its training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fewstep-classifier"] = "fewstep-classifier"
    name: str
    shape: tuple[Width, Width, Width]
    classes: int = Field(ge=1, le=MAX_CLASSES)
    widths: Widths
    dimension: Width
    training: dict[str, Any] = {}


def save_classifier(
    network: Classifier, folder: str | Path, *, name: str, shape: tuple[int, int, int], training: dict[str, Any]
) -> None:
    """Writes ``classifier.json`` and ``classifier.safetensors``.

    ``training`` is a record for readers (data, seed, epochs, accuracy). Raises ``UserError`` if the folder cannot be
    written.
    """
    folder = Path(folder)
    widths = tuple(m.out_channels for m in network.convolutions if isinstance(m, nn.Conv2d))
    config = ClassifierConfig.model_validate(
        {
            "name": name,
            "shape": shape,
            "classes": network.head.out_features,
            "widths": widths,
            "dimension": network.dimension,
            "training": training,
        }
    )
    write_tensors(network.state_dict(), folder / WEIGHTS)
    write_text(config.model_dump_json(indent=2) + "\n", folder / CONFIG)


def load_classifier(folder: str | Path) -> tuple[Classifier, ClassifierConfig]:
    """The network, in eval mode on the CPU, and its config.

    Raises ``UserError`` if a file is missing or damaged or if they do not belong together.
    """
    file = Path(folder) / CONFIG
    with reading(file, "description of a classifier"):
        config = ClassifierConfig.model_validate_json(file.read_bytes())
    network = Classifier(config.shape[0], config.classes, config.widths, config.dimension)
    load_weights(network, Path(folder) / WEIGHTS)
    return network.eval(), config
