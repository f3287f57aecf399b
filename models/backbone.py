"""The base class of networks: the optional features that fewstep uses besides calling them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition

Past = tuple[Tensor, ...]  # what a causal network keeps of earlier frames; the batch is the first axis of each


class Backbone(nn.Module):
    """A network ``(x_t [B, ...], t [B], condition) -> tensor like x_t`` with defaults for optional features.

    Any ``nn.Module`` with this signature can be a backbone; this base class is for those that support more.
    ``lora_targets`` are the layers that LoRA adapts by default, named as in PEFT, and ``feature_layers`` the modules
    whose outputs are a discriminator's default features. ``repeated_blocks`` are the class names of the blocks that
    ``compile: true`` compiles. A ``causal`` network of videos can evaluate frames one after the other (``after``).
    """

    lora_targets: Sequence[str] = ()
    feature_layers: Sequence[str] = ()
    repeated_blocks: Sequence[str] = ()
    causal: bool = False

    @classmethod
    def build(cls, shape: tuple[int, ...], classes: int, **settings: Any) -> Self:
        """A new network for samples of ``shape`` [C, ...] and ``classes`` class labels (0: none). For a model with a
        vocabulary ``settings`` has its number of words as ``vocabulary``."""
        return cls(**settings)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError

    def after(self, past: Past | None, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Past]:
        """Of a causal network: the output for frames ``x_t`` [B, C, F, H, W] that follow those of ``past``, None at the
        start, and what the frames after them need."""
        raise NotImplementedError

    def with_step_counts(self, most: int) -> Backbone:
        """A copy that is also conditioned on ``condition["steps"]`` in 1..most and initially computes the same.

        Raises ``UserError`` if the network does not support it.
        """
        raise UserError(f"A {type(self).__name__} cannot be conditioned on a step count, which unify needs.")

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        """Recomputes blocks in the backward pass by ``function(block, *args)`` instead of storing their activations.

        Raises ``UserError`` if the network does not support it.
        """
        raise UserError(f"gradient_checkpointing is not supported by {type(self).__name__}.")
