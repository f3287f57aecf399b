"""A pipeline class that diffusers does not have, and its family, as a user's module would define them."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.hub.sd import StableDiffusion


class OwnPipeline(StableDiffusionPipeline):
    """Stable Diffusion by another name."""


class OwnFamily(StableDiffusion):
    pipelines = ("OwnPipeline",)
    classes = {"OwnPipeline": OwnPipeline}  # noqa: RUF012

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return super().predict(network, x_t, t, condition)
