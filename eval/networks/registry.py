"""The networks that a protocol's metrics look through."""

from __future__ import annotations

import torch

from fewstep.eval.networks.clip import Clip
from fewstep.eval.networks.dinov2 import DinoV2
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.features import Features
from fewstep.eval.networks.i3d import I3d
from fewstep.eval.networks.inception import Inception, InceptionClasses
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol


def build_networks(
    protocol: Protocol, place: WeightsLocator, device: torch.device | str, compared: bool = False
) -> dict[str, Features]:
    """The networks of a protocol's metrics or, ``compared``, of those that have a reference. Raises ``UserError``."""
    keys = {metric.network for metric in protocol.chosen if metric.reference or not compared}
    return {key: _network(key, protocol, place, device) for key in sorted(keys)}


def _network(key: str, protocol: Protocol, place: WeightsLocator, device: torch.device | str) -> Features:
    match key:
        case "inception":
            return Inception.load(protocol.inception, place, device)
        case "inception_classes":
            return InceptionClasses(Inception.load("legacy_tensorflow", place, device))
        case "clip":
            return Clip.load(protocol.clip, place, device)
        case "clip_fid":
            return Clip.load("ViT-B-32:openai", place, device, unit=False)
        case "cmmd":
            return Clip.load("ViT-L-14-336:openai", place, device, squash=True)
        case "dinov2":
            return DinoV2.load(place, device)
        case "efficientnet":
            return EfficientNet.load(device)
    assert key == "i3d"
    return I3d.load(place, device)
