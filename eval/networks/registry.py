"""The networks of metrics by name.

A network of your own is a function ``(protocol, locator, device) -> FeatureNetwork`` in your module: give its dotted
name (``package.module:load``) in a ``Metric``, or register a short name with ``fewstep.register("network", NAME)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fewstep.core.registry import Registry
from fewstep.eval.networks.clip import Clip
from fewstep.eval.networks.dinov2 import DinoV2
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.features import FeatureNetwork
from fewstep.eval.networks.i3d import I3d
from fewstep.eval.networks.inception import Inception, InceptionClasses, InceptionPatch
from fewstep.eval.networks.inception_spatial import InceptionSpatial
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol

Loader = Callable[[Protocol, WeightsLocator, torch.device | str], FeatureNetwork]
BUILTIN: dict[str, Loader] = {
    "inception": lambda protocol, locator, device: Inception.load(protocol.inception, locator, device),
    "inception_classes": lambda protocol, locator, device: InceptionClasses(
        Inception.load("legacy_tensorflow", locator, device)
    ),
    "inception_spatial": lambda protocol, locator, device: InceptionSpatial.load(locator, device),
    "inception_patch": lambda protocol, locator, device: InceptionPatch(
        Inception.load(protocol.inception, locator, device)
    ),
    "clip": lambda protocol, locator, device: Clip.load(protocol.clip, locator, device),
    "clip_fid": lambda protocol, locator, device: Clip.load("ViT-B-32:openai", locator, device, normalize=False),
    "cmmd": lambda protocol, locator, device: Clip.load("ViT-L-14-336:openai", locator, device, square=True),
    "dinov2": lambda protocol, locator, device: DinoV2.load(locator, device),
    "efficientnet": lambda protocol, locator, device: EfficientNet.load(device),
    "i3d": lambda protocol, locator, device: I3d.load(locator, device),
}
NETWORKS: Registry[Loader] = Registry(
    "network", lambda: BUILTIN, callable, "a function of (protocol, locator, device) that returns a FeatureNetwork"
)


def build_networks(
    names: Iterable[str], protocol: Protocol, locator: WeightsLocator, device: torch.device | str
) -> dict[str, FeatureNetwork]:
    """The networks of these names with the settings of a protocol. Raises ``UserError`` on an unknown name and on
    missing or damaged weights."""
    return {name: NETWORKS.resolve(name)(protocol, locator, device) for name in sorted(set(names))}
