"""Rewards: numbers that say how much an image is liked, higher is better, and how often one model beats another.

They stand for the human or learned preferences of the papers: cheap, measurable, and different enough that one can be
optimised while another is only watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fewstep.errors import UserError, nearest
from fewstep.eval.features import ClassifierFeatures, extract


def confidence(network: ClassifierFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of the label, by the evaluator's classifier."""
    logits = network.network.classify(extract(network, images).to(network.network.device))
    return logits.log_softmax(1).cpu().gather(1, labels.cpu()[:, None])[:, 0]


def symmetry(network: ClassifierFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean difference of an image and its mirror image, in 0..255."""
    x = images.float()
    return -(x - x.flip(-1)).abs().flatten(1).mean(1)


def brightness(network: ClassifierFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """The mean of the pixels, in 0..255."""
    return images.float().flatten(1).mean(1)


Reward = Callable[[ClassifierFeatures, Tensor, Tensor], Tensor]  # (network, uint8 [N, C, H, W], labels [N]) -> [N]
REWARDS: dict[str, Reward] = {"confidence": confidence, "symmetry": symmetry, "brightness": brightness}


def find_reward(name: str) -> Reward:
    """A reward by name. Raises ``UserError`` on an unknown one."""
    if name not in REWARDS:
        raise UserError(f"Unknown reward {name!r}{nearest(name, REWARDS)}.")
    return REWARDS[name]


def win_rate(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """How often a reward of ours [N] is above theirs [N] (a tie is half a win), with Wilson's 95 % interval."""
    n, z = len(ours), 1.959964
    rate = ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean().item()
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return rate, middle - half, middle + half
