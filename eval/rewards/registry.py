"""Rewards by name: functions that rate images; higher is better.

They replace the human or learned preferences of the papers: cheap, measurable, and different enough that one can be
optimised while another is only observed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fewstep.core.registry import Registry
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.rewards.brightness import brightness
from fewstep.eval.rewards.confidence import confidence
from fewstep.eval.rewards.symmetry import symmetry

Reward = Callable[[ClassifierFeatures, Tensor, Tensor], Tensor]  # (network, uint8 [N, C, H, W], labels [N]) -> [N]
REWARDS: Registry[Reward] = Registry(
    "reward", lambda: {"confidence": confidence, "symmetry": symmetry, "brightness": brightness}, callable,
    "a function of (network, images, labels)",
)  # fmt: skip


def find_reward(name: str) -> Reward:
    """A reward by name. Raises ``UserError`` on an unknown one."""
    return REWARDS.resolve(name)
