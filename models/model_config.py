"""``config.json`` of a saved model: everything needed to rebuild the network and to generate samples of its shape."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import nn

from fewstep.core.errors import UserError
from fewstep.core.registry import Registry
from fewstep.models.backbone import Backbone
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.prediction import Kind
from fewstep.models.schedules import schedule_from_dict
from fewstep.models.unet import UNet

Size = tuple[int, int, int]  # height, width and frames in pixels
BACKBONES: Registry[type[nn.Module]] = Registry(
    "backbone", lambda: {"unet": UNet}, lambda value: isinstance(value, type) and issubclass(value, nn.Module),
    "a subclass of torch.nn.Module",
)  # fmt: skip


class FewStep(BaseModel):
    """How a distilled student is sampled: its times (from 1 downwards) and the rule between them.

    ``shift`` is that of the times, for grids of another number of steps. ``counts``: the numbers of steps that it
    serves, told to it as ``condition["steps"]``; none: it is not told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    times: tuple[float, ...]
    rule: Literal["renoise", "deterministic"]
    counts: tuple[int, ...] = ()
    shift: float = 1.0


class Lora(BaseModel):
    """An adapter's settings, as PEFT takes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: PositiveInt
    alpha: float = Field(gt=0)
    targets: tuple[str, ...] = Field(min_length=1)


class ModelConfig(BaseModel):
    """``config.json``: everything needed to rebuild a model and to generate samples of the right shape.

    With ``boundaries`` it is several backbones, each for the times down to its boundary (``denoiser.Routed``). With
    ``base``, another model's folder or name, the network is that model's: with other weights or, with ``lora``, its
    own with an adapter. ``shift`` belongs to a teacher's time grid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fewstep-model"] = "fewstep-model"
    backbone: dict[str, Any]
    noise_schedule: dict[str, Any] = {"name": "rectified_flow"}
    prediction: Kind = "velocity"
    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    classes: int = Field(0, ge=0)
    shift: float = Field(1.0, gt=0)
    base: str | None = None
    lora: Lora | None = None
    few_step: FewStep | None = None
    boundaries: tuple[float, ...] | None = None

    def build(self, feature_layers: tuple[str, ...] = (), *, from_file: bool = False) -> Denoiser:
        """A freshly initialised denoiser in eval mode. ``from_file``: this config was read from a saved model, so its
        backbone is not imported (see ``core.registry``).

        Raises ``UserError`` on an unknown backbone, setting or feature layer.
        """
        settings = dict(self.backbone)
        cls = BACKBONES.resolve(str(settings.pop("name", "")), from_file=from_file)
        try:
            experts = [self._network(cls, settings) for _ in self.boundaries or [0.0]]
            backbone = Routed(experts, self.boundaries) if self.boundaries else experts[0]
            return Denoiser(backbone, schedule_from_dict(self.noise_schedule), self.prediction, feature_layers).eval()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"The model's settings do not build a network: {error}.") from error

    def _network(self, cls: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
        """A subclass of ``Backbone`` also receives shape and classes; any other network its settings alone."""
        if issubclass(cls, Backbone):
            return cls.build(self.shape, self.classes, **settings)
        return cls(**settings)
