"""``config.json`` of a saved model: everything needed to rebuild the network and to generate samples of its shape."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn

from fewstep.core.errors import UserError, nearest
from fewstep.core.registry import Registry
from fewstep.models.backbone import Backbone
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.prediction import Kind
from fewstep.models.schedules import schedule_from_dict
from fewstep.models.unet import UNet
from fewstep.models.video_unet import VideoUNet
from fewstep.models.vocabulary import Vocabulary

Size = tuple[int, int, int]  # height, width and frames in pixels
Width = Annotated[int, Field(ge=1, le=65_536)]
Time = Annotated[float, Field(ge=0, le=1)]
Shift = Annotated[float, Field(ge=1e-4, le=1e4)]
BACKBONES: Registry[type[nn.Module]] = Registry(
    "backbone", lambda: {"unet": UNet, "video_unet": VideoUNet},
    lambda value: isinstance(value, type) and issubclass(value, nn.Module), "a subclass of torch.nn.Module",
)  # fmt: skip


class FewStep(BaseModel):
    """How a distilled student is sampled: its times, decreasing from 1, and the rule between them.

    ``shift`` is the shift of the times, for grids with another number of steps. ``counts``: the numbers of steps that
    the student supports and receives as ``condition["steps"]``; empty: it is not conditioned on the step count.
    ``frame_by_frame``: it generates the frames of a video one after the other, each in all its steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    times: tuple[Time, ...] = Field(min_length=1)
    rule: Literal["renoise", "deterministic"]
    counts: tuple[Width, ...] = ()
    shift: Shift = 1.0
    frame_by_frame: Literal[True] | None = None

    @field_validator("times")
    @classmethod
    def _decreasing(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if any(after >= before for before, after in pairwise((*times, 0.0))):
            raise ValueError("times must decrease and be above 0")
        return times


class Lora(BaseModel):
    """An adapter's settings, as in PEFT."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    rank: Width
    alpha: float = Field(gt=0, le=65_536)
    targets: tuple[str, ...] = Field(min_length=1)


class ModelConfig(BaseModel):
    """``config.json``. With ``boundaries`` the model has several backbones, each for the times down to its boundary
    (``denoiser.Routed``), whose settings are ``expert_backbones`` where they differ. With ``base``, another model's
    folder or name, the network is that model's: with ``lora`` its weights (whose SHA-256 is ``base_sha256``) and an
    adapter, otherwise other weights; a pipeline's network with other settings than its base's has them all in
    ``backbone["network"]``. ``classes`` is 0 for an unconditional model, a pipeline's, and one that takes prompts of
    the words in ``vocabulary``; ``class_names`` are those of the training images, by label. ``shift`` applies to a
    teacher's time grid. ``precision`` is that in which the network was trained and therefore computes,
    ``base_weights`` the type of the base's weights under an adapter; None is float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal["fewstep-model"] = "fewstep-model"
    backbone: dict[str, Any]
    noise_schedule: dict[str, Any] = {"name": "rectified_flow"}
    prediction: Kind = "velocity"
    shape: tuple[Width, ...] = Field(min_length=1)
    classes: int = Field(0, ge=0, le=10**6)
    class_names: tuple[str, ...] | None = None
    vocabulary: Vocabulary | None = None
    shift: Shift = 1.0
    base: str | None = None
    base_sha256: str | None = None
    lora: Lora | None = None
    few_step: FewStep | None = None
    boundaries: tuple[Time, ...] | None = Field(None, max_length=16)
    expert_backbones: tuple[dict[str, Any], ...] | None = Field(None, max_length=16)
    precision: Literal["bfloat16"] | None = None
    base_weights: Literal["bfloat16"] | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        names = self.class_names
        if names is not None and not len(names) == len(set(names)) == self.classes:
            raise ValueError(f"class_names must be {self.classes} different names, one for each of the classes")
        if self.expert_backbones is not None and len(self.expert_backbones) != len(self.boundaries or ()):
            raise ValueError("expert_backbones must have the settings of one network for each of the boundaries")
        if self.vocabulary is not None and self.classes:
            raise ValueError("give either classes or vocabulary: a model takes class labels or prompts")
        return self

    @property
    def backbones(self) -> tuple[dict[str, Any], ...]:
        """The settings of the network, or of each expert's."""
        return self.expert_backbones or (self.backbone,) * len(self.boundaries or (0.0,))

    @property
    def takes_prompts(self) -> bool:
        """Whether the condition comes from prompts: of a pipeline's text encoders, or of words of the vocabulary."""
        return self.backbone.get("name") == "diffusers" or self.vocabulary is not None

    @property
    def unconditional(self) -> bool:
        """Whether the model takes neither class labels nor prompts."""
        return not self.classes and not self.takes_prompts

    def label_of(self, label: int | str) -> int:
        """The class of a number, or of a name in ``class_names``. Raises ``UserError`` if the model has none of it."""
        names = self.class_names or ()
        if isinstance(label, str) and label in names:
            return names.index(label)
        with suppress(TypeError, ValueError, OverflowError):
            if 0 <= (number := int(label)) < max(1, self.classes):
                return number
        hint = nearest(str(label), names) if names else ""
        raise UserError(f"The model has no class {label!r}{hint}; it has 0 to {max(1, self.classes) - 1}.")

    def require_guidable(self, scale: float) -> None:
        """Raises ``UserError`` if guidance with this scale has no condition to drop."""
        if self.unconditional and scale != 1:
            raise UserError(f"Guidance {scale:g} has no condition to drop: set it to 1 for an unconditional model.")

    def build(self, feature_layers: tuple[str, ...] = (), *, from_file: bool = False) -> Denoiser:
        """A new denoiser in eval mode, randomly initialised. ``from_file``: this config was read from a saved model, so
        that its backbone must not cause an import (see ``core.registry``).

        Raises ``UserError`` on an unknown backbone, setting or feature layer.
        """
        try:
            experts = [self._network(settings, from_file) for settings in self.backbones]
            backbone = Routed(experts, self.boundaries) if self.boundaries else experts[0]
            return Denoiser(backbone, schedule_from_dict(self.noise_schedule), self.prediction, feature_layers).eval()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"Cannot build a network from the model's settings: {error}.") from error

    def _network(self, backbone: dict[str, Any], from_file: bool) -> nn.Module:
        """A subclass of ``Backbone`` also receives shape, classes and, with a vocabulary, its number of words; any
        other network only its settings."""
        settings = dict(backbone)
        cls = BACKBONES.resolve(str(settings.pop("name", "")), from_file=from_file)
        if issubclass(cls, Backbone):
            words = {"vocabulary": len(self.vocabulary.words)} if self.vocabulary is not None else {}
            return cls.build(self.shape, self.classes, **settings, **words)
        return cls(**settings)


def with_settings(backbone: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network with changed ones; those of a network with another ``name`` are its own."""
    return dict(changed) if changed.get("name", backbone["name"]) != backbone["name"] else {**backbone, **changed}
