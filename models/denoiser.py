"""The common interface of teacher, student and fake score: ``Denoiser(x_t, t, condition) -> Prediction``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.transfer import send
from fewstep.models.backbone import Backbone, Past
from fewstep.models.condition import Condition
from fewstep.models.prediction import KINDS, Coefficients, Kind, Prediction
from fewstep.models.schedules import NoiseSchedule

AUTO = "auto"  # the network's own ``feature_layers``


def batch_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times for a batch ``x`` [B, ...] as float64: a number or [B] becomes [B]; a shape that broadcasts against ``x``
    keeps its axes, with B as the first. Raises ``ValueError`` on any other shape."""
    times = torch.as_tensor(t, dtype=torch.float64)
    if times.ndim == 0:
        return times.expand(x.shape[0])
    if times.shape == x.shape[:1]:
        return times
    if times.ndim == x.ndim and all(n in (1, size) for n, size in zip(times.shape, x.shape, strict=True)):
        return times.expand(x.shape[0], *times.shape[1:])
    raise ValueError(f"times of shape {tuple(times.shape)} fit neither the batch nor the shape {tuple(x.shape)}")


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Adds trailing axes to per-sample values [B] so that they broadcast against ``x`` [B, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim == 1 else t


def resolve_feature_layers(requested: Sequence[str], network: nn.Module) -> tuple[str, ...]:
    """``requested`` module paths, with ``auto`` replaced by the ``feature_layers`` of ``network``.

    Raises ``ValueError`` if the network defines none.
    """
    own = tuple(network.feature_layers) if isinstance(network, Backbone) else ()
    if AUTO in requested and not own:
        raise ValueError(f"a {type(network).__name__} has no default feature layers; set feature_layers")
    return tuple(dict.fromkeys(path for layer in requested for path in (own if layer == AUTO else (layer,))))


_features: ContextVar[dict[str, Tensor] | None] = ContextVar("features", default=None)


def _record(path: str, module: nn.Module, inputs: object, output: Tensor | tuple[Any, ...]) -> None:
    """Forward hook of a feature layer. It stores the output for the denoiser that is running, so that it works in deep
    copies and in networks shared by several roles; outside a forward pass (in recomputation) it does nothing. Of
    several outputs it takes the last tensor: joint transformer blocks return the prompt's tokens and then the image's,
    U-Net blocks their output and a tuple of residuals."""
    features = _features.get()
    if features is not None:
        features[path] = output if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)][-1]


@dataclass(frozen=True)
class GuidanceStyle:
    """How a model applies guidance, where it differs from plain classifier-free guidance.

    ``embedded``: the network receives the scale as ``condition["guidance"]`` and is evaluated once (guidance-distilled
    models). ``postprocess(cond, out)`` changes the guided output [B, ...] (Qwen-Image restores norms).
    """

    embedded: bool = False
    postprocess: Callable[[Tensor, Tensor], Tensor] | None = None


DEFAULT_STYLE = GuidanceStyle()


class Denoiser(nn.Module):
    """A backbone, the noise schedule that it was trained on, the quantity that it predicts, and its guidance style.

    ``backbone(x_t, t, condition)`` takes ``t`` float64 in [0, 1] (shape [B], or one that broadcasts against ``x_t``, as
    for video frames at different noise levels) and returns a tensor like ``x_t``. ``feature_layers`` are paths of
    modules whose outputs every prediction contains as ``features``. Their hooks are registered here, once, so that they
    also work in a backbone with compiled blocks. Name blocks, not linear layers, which an adapter may replace.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        kind: Kind = "velocity",
        feature_layers: Sequence[str] = (),
        style: GuidanceStyle = DEFAULT_STYLE,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown prediction type {kind!r}; known: {', '.join(KINDS)}")
        self.backbone = backbone
        self.schedule = schedule
        self.kind: Kind = kind
        self.style = style
        self.precision = torch.float32  # in which the backbone computes, by autocast
        self.record_features(feature_layers)

    def record_features(self, layers: Sequence[str]) -> None:
        """Adds the outputs of these layers (paths, or ``auto``) of the backbone to the ``features`` of predictions.

        Raises ``ValueError`` if a module does not exist, or if the network defines no layers for ``auto``.
        """
        for path in resolve_feature_layers(layers, self.backbone):
            try:
                self.backbone.get_submodule(path).register_forward_hook(partial(_record, path))
            except AttributeError as error:
                raise ValueError(f"feature layer {path!r} does not exist: {error}") from error

    def forward(self, x_t: Tensor, t: Tensor | float, condition: Condition) -> Prediction:
        times = batch_times(t, x_t)
        raw, features = self.evaluate(x_t, times, condition)
        return Prediction(raw, self.kind, x_t, Coefficients.at(self.schedule, expand_like(times, x_t)), features)

    def evaluate(self, x_t: Tensor, times: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """The backbone's output, in at least float32, and the outputs of the feature layers."""
        features: dict[str, Tensor] = {}
        token = _features.set(features)
        try:
            return self.raw(x_t, times, condition), features
        finally:
            _features.reset(token)

    def raw(self, x_t: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The backbone's output alone, in at least float32: for samplers, which compute the coefficients themselves."""
        with self._autocast(x_t.device):
            raw: Tensor = self.backbone(x_t, times, condition)
        return _checked(raw, x_t)

    def after(self, past: Past | None, x_t: Tensor, t: Tensor | float, condition: Condition) -> tuple[Prediction, Past]:
        """The prediction, without features, for frames ``x_t`` [B, C, F, H, W] that follow those of ``past``, None at
        the start, and the past of the frames after them. Raises ``UserError`` if the network is not causal."""
        backbone, times = self.backbone, batch_times(t, x_t)
        if not (isinstance(backbone, Backbone) and backbone.causal):
            raise UserError(f"A {type(backbone).__name__} that is not causal has no frames one after the other.")
        with self._autocast(x_t.device):
            raw, past = backbone.after(past, x_t, times, condition)
        c = Coefficients.at(self.schedule, expand_like(times, x_t))
        return Prediction(_checked(raw, x_t), self.kind, x_t, c, {}), past

    @property
    def causal(self) -> bool:
        """Whether frames can be evaluated one after the other (``after``)."""
        return isinstance(self.backbone, Backbone) and self.backbone.causal

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        cached = torch.is_grad_enabled()  # without a backward pass, cached casts of weights are only a second network
        mixed = self.precision != torch.float32
        return torch.autocast(device.type, self.precision, cache_enabled=cached) if mixed else nullcontext()


def _checked(raw: Tensor, x_t: Tensor) -> Tensor:
    """A backbone's output in at least float32. Raises ``ValueError`` if it does not have the shape of its input."""
    if raw.shape != x_t.shape:
        raise ValueError(f"the backbone returned {tuple(raw.shape)} for an input of {tuple(x_t.shape)}")
    return raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw


class Routed(Backbone):
    """A backbone of several experts by noise level: ``t`` goes to the first ``experts[k]`` with ``boundaries[k] <= t``.

    ``boundaries`` decrease to 0, e.g. ``(0.875, 0.0)`` for a high-noise and a low-noise network. A boundary belongs to
    the noisier expert; a few-step student's boundaries lie strictly between two of its times. Mixed batches are split.
    With ``every_expert``, experts without a sample are evaluated and differentiated, too: all processes must do so
    equally often with a network that is split over them.
    """

    def __init__(self, experts: Sequence[nn.Module], boundaries: Sequence[float]) -> None:
        super().__init__()
        falling = list(boundaries) == sorted(boundaries, reverse=True)
        if not falling or len(experts) != len(boundaries) or list(boundaries[-1:]) != [0]:
            raise ValueError("each expert needs a boundary; boundaries must decrease and end at 0")
        self.experts = nn.ModuleList(experts)
        self.boundaries = tuple(boundaries)
        self.every_expert = False

    def expert_of(self, t: Tensor) -> Tensor:
        """The index of the expert for each time of [B]. Raises ``ValueError`` on several times per sample (frames)."""
        if t.ndim != 1:
            raise ValueError(f"experts need one time per sample, got times of shape {tuple(t.shape)}")
        return (t[:, None] < torch.tensor(self.boundaries, dtype=t.dtype, device=t.device)).sum(1)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        expert = self.expert_of(t)
        used = expert.unique().tolist()
        if len(used) == 1 and not self.every_expert:
            return self.experts[used[0]](x_t, t, condition)  # type: ignore[no-any-return]
        parts, outputs, nothing = [], [], torch.zeros((), device=x_t.device)
        for k in range(len(self.experts)) if self.every_expert else used:  # in one order in all processes
            rows = (expert == k).nonzero()[:, 0]
            if len(rows):
                there = send(rows, x_t.device)
                parts.append(rows)
                outputs.append(self.experts[k](x_t[there], t[rows], condition.index(there)))
            else:
                nothing = nothing + 0 * self.experts[k](x_t[:1], t[:1], condition.index(slice(1))).sum()
        order = torch.argsort(torch.cat(parts))
        out = torch.cat(outputs)[send(order, x_t.device)]
        return out + nothing if self.every_expert else out

    @property
    def lora_targets(self) -> Sequence[str]:  # type: ignore[override]
        return tuple(dict.fromkeys(target for expert in self._backbones for target in expert.lora_targets))

    @property
    def repeated_blocks(self) -> Sequence[str]:  # type: ignore[override]
        return tuple(dict.fromkeys(block for expert in self._backbones for block in expert.repeated_blocks))

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        for expert in self._backbones:
            expert.checkpoint_gradients(function)

    @property
    def _backbones(self) -> list[Backbone]:
        return [expert for expert in self.experts if isinstance(expert, Backbone)]


def routed(experts: Sequence[Denoiser], boundaries: Sequence[float]) -> Denoiser:
    """One denoiser of several that differ only in their backbones; raises ``ValueError`` as ``Routed`` does."""
    first = experts[0]
    backbone = Routed([expert.backbone for expert in experts], boundaries)
    denoiser = Denoiser(backbone, first.schedule, first.kind, style=first.style)
    denoiser.precision = first.precision
    return denoiser
