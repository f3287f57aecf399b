"""Tiny causal networks of videos, and what a rollout of them needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from worlds import FLOW, trained

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.distill.roles import Roles
from fewstep.distill.update import MicroBatch
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.video_unet import VideoUNet

TIMES = (1.0, 0.75, 0.5, 0.25)
SHAPE, CLASSES = (3, 4, 8, 8), 2
TINY = {"widths": [8, 16], "blocks": [1, 1], "embedding": 8, "heads": 2}


class Videos:
    """A source of class labels, for videos of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        return Batch(size, self.shape, Condition.of_labels(random.integers(size, CLASSES), CLASSES))


def micro_batch(roles: Roles, size: int = 8, shape: tuple[int, ...] = SHAPE, shard: int = 0) -> MicroBatch:
    random = KeyedRandom(0, 0, "rollout", shard)
    return MicroBatch({"data": Videos(shape)(random, size)}, random, 0, roles)


def network(causal: bool = True, **settings: Any) -> VideoUNet:
    """A random network with every weight in use: new layers over frames are zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = VideoUNet(**{**TINY, "classes": CLASSES, "channels": 3, "causal": causal, **settings})
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return new


def student_roles(backbone: nn.Module) -> Roles:
    return Roles({"student": trained(Denoiser(backbone, FLOW))})
