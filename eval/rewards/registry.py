"""Rewards by name: functions that rate images; higher is better.

They replace the human or learned preferences of the papers: cheap, measurable, and different enough that one can be
optimised while another is only observed. A reward sees the class labels of the images, a prompt reward their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.registry import Registry
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.rewards.brightness import brightness
from fewstep.eval.rewards.confidence import confidence
from fewstep.eval.rewards.prompt import prompt
from fewstep.eval.rewards.symmetry import symmetry

Reward = Callable[[ClassifierFeatures, Tensor, Tensor], Tensor]  # (network, uint8 [N, C, H, W], labels [N]) -> [N]
PromptReward = Callable[[ClassifierFeatures, Tensor, Sequence[str]], Tensor]  # the same with N prompts
REWARDS: Registry[Reward] = Registry(
    "reward", lambda: {"confidence": confidence, "symmetry": symmetry, "brightness": brightness}, callable,
    "a function of (network, images, labels)",
)  # fmt: skip
PROMPT_REWARDS: Registry[PromptReward] = Registry(
    "prompt_reward", lambda: {"prompt": prompt, "symmetry": symmetry, "brightness": brightness}, callable,
    "a function of (network, images, prompts)",
)  # fmt: skip


def find_reward(name: str) -> Reward:
    """A reward by name. Raises ``UserError`` on an unknown one."""
    return REWARDS.resolve(name)


def find_prompt_reward(name: str) -> PromptReward:
    """A prompt reward by name. Raises ``UserError`` on an unknown one."""
    return PROMPT_REWARDS.resolve(name)


def rate(
    name: str, reward: Callable[[ClassifierFeatures, Tensor, Any], Tensor], network: ClassifierFeatures,
    images: Tensor, conditions: Tensor | Sequence[str],
) -> Tensor:  # fmt: skip
    """A reward of images [N] by their labels [N] or prompts, on the host; ``name`` is for messages. Raises
    ``UserError`` if it is not one finite number per image."""
    values = reward(network, images, conditions).cpu()
    if values.shape != (len(images),) or not values.isfinite().all():
        raise UserError(
            f"The reward {name} must return one finite number for each of {len(images)} images; it "
            f"returned a tensor {list(values.shape)}{'' if values.isfinite().all() else ' that is not finite'}."
        )
    return values
