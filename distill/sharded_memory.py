"""What ``shard`` saves and costs in memory: each device holds some rows of a split tensor, and gathers the layers of a
group when it evaluates them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from fewstep.distill import sharding
from fewstep.distill.roles import Role
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser
from fewstep.models.live_memory import Graph


@dataclass(frozen=True)
class Shards:
    """The tensors, by id, that are split over ``devices``, and the bytes of each role's groups of layers in the order
    in which they are evaluated."""

    devices: int = 1
    split: frozenset[int] = frozenset()
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()  # the roles whose own parameters are split

    @staticmethod
    def of(roles: Mapping[str, Role], devices: int) -> Shards:
        """Those of roles whose networks are split; adapters stay whole."""
        backbones = {name: role.module.backbone for name, role in roles.items() if isinstance(role.module, Denoiser)}
        views = {name: view for name, view in backbones.items() if isinstance(view, AdapterView)}
        adapters = {id(parameter) for view in views.values() for parameter in view.parameters()}
        split, groups = set[int](), dict[str, tuple[int, ...]]()
        for name, backbone in backbones.items():
            network = views[name].shared_network if name in views else backbone
            found = list(_groups(network, adapters))
            split |= {id(parameter) for group in found for parameter in group}
            groups[name] = tuple(sum(parameter.nbytes for parameter in group) for group in found)
        trained = {name for name, role in roles.items() if any(id(p) in split for p in role.parameters)}
        return Shards(devices, frozenset(split), groups, frozenset(trained))

    def elements(self, tensor: Tensor) -> int:
        """The number of elements of a tensor that a device holds; the first holds the most."""
        if id(tensor) not in self.split:
            return tensor.numel()
        rows = tensor.shape[0] if tensor.ndim else 1
        return math.ceil(rows / self.devices) * (tensor.numel() // max(rows, 1))

    def nbytes(self, tensors: Iterable[Tensor]) -> int:
        """The bytes of tensors that a device holds."""
        return sum(self.elements(tensor) * tensor.element_size() for tensor in tensors)

    def gathered(self, role: str, graph: Graph) -> int:
        """The most bytes that evaluating a role needs for whole layers: those of a group, as they arrive and as they
        are used, and those of the next, which are already on their way; in the backward pass of a trained copy also
        the gradients of a group, as they are computed and as they are sent."""
        groups = self.groups.get(role, ())
        gradients = 2 * max(groups, default=0) if role in self.trained and graph == "parameters" else 0
        return gradients + max((2 * group + following for group, following in pairwise((*groups, 0))), default=0)


def _groups(network: nn.Module, whole: set[int]) -> Iterator[list[nn.Parameter]]:
    """The parameters that are gathered at a time, without those that stay ``whole``."""
    seen = set(whole)
    for group in (*sharding.groups(network), network):
        own = [parameter for parameter in group.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if own:
            yield own
