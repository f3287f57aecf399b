"""Splits networks over processes (torch's ``fully_shard``, FSDP2): the only place that knows sharded tensors.

Copies are split; adapters stay whole on a split base. Each process holds some rows of every tensor. A group of layers
is gathered when it runs, and its gradients are reduced to their mean over the processes, so all processes must evaluate
a split network equally often.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser, Routed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

GROUP = 200_000_000  # a module with more parameters is split into groups of its own


def groups(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered at a time, innermost first: the children of the network, the items of its lists,
    and the children of a child with more than ``GROUP`` parameters.

    A network alone in a wrapper is entered, so that no group contains all layers: a loss on a feature alone would not
    reach the output of such a group, and with it its gradients.
    """
    module = _entered(module)
    if isinstance(module, Routed):
        for expert in module.experts:
            yield from (*groups(expert), expert)
        return
    for child in module.children():
        if not any(True for _ in child.parameters()):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _items(child)
        else:
            yield from _large(child)


def _entered(module: nn.Module) -> nn.Module:
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    alone = len(children) == 1 and not any(True for _ in module.parameters(recurse=False))
    return _entered(children[0]) if alone and not isinstance(children[0], nn.ModuleList) else module


def _items(container: nn.Module) -> Iterator[nn.Module]:
    for item in container.children():
        if isinstance(item, nn.ModuleList | nn.ModuleDict):
            yield from _items(item)
        elif any(True for _ in item.parameters()):
            yield from _large(item)


def _large(module: nn.Module) -> Iterator[nn.Module]:
    if sum(p.numel() for p in module.parameters()) > GROUP:
        for child in module.children():
            yield from _items(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else _large(child)
    if any(True for _ in module.parameters()):
        yield module


def split(denoiser: Denoiser, mesh: DeviceMesh) -> None:
    """Splits the network of a denoiser over the processes of ``mesh``, in place; of adapters, their base.

    Raises ``UserError`` if the network cannot be split.
    """
    from torch.distributed.fsdp import fully_shard

    backbone = denoiser.backbone
    network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
    for tensor in network.parameters():
        if not tensor.is_floating_point():
            raise UserError("shard: true cannot split quantized weights; set weights: bfloat16 or float32.")
        tensor.data = tensor.data.contiguous()
    if network is backbone:
        # what copies are made from; not as an attribute, which would make it a submodule with parameters
        denoiser.__dict__["unsplit"] = _without_memory(network), mesh
    done: set[int] = set()
    for group in (*groups(network), network):
        if id(group) not in done:  # a module may be used in two places
            done.add(id(group))
            fully_shard(group, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, Routed):
            module.every_expert = True


def is_split(denoiser: Denoiser) -> bool:
    """Whether the network of a denoiser is split."""
    backbone = denoiser.backbone
    network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
    return any(is_sharded(parameter) for parameter in network.parameters())


def twin(denoiser: Denoiser, dtype: torch.dtype | None = None) -> Denoiser:
    """A copy of a split denoiser, split alike, optionally in another type; no process sends anything."""
    network, device = denoiser.backbone, next(denoiser.parameters()).device
    unsplit, mesh = denoiser.__dict__["unsplit"]
    copied = Denoiser(copy.deepcopy(unsplit), denoiser.schedule, denoiser.kind, style=denoiser.style)
    copied.precision = denoiser.precision
    if dtype is not None:
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    split(copied, mesh)
    copied.backbone.to_empty(device=device)
    with torch.no_grad():
        values = dict((*network.named_parameters(), *network.named_buffers()))
        for name, tensor in (*copied.backbone.named_parameters(), *copied.backbone.named_buffers()):
            local(tensor).copy_(local(values[name]))
    return copied.eval()


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device."""
    tensors = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {id(t): _meta(t) for t in tensors}
    return copy.deepcopy(module, memo)


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def local(tensor: Tensor) -> Tensor:
    """The rows of a split tensor that this process holds; a whole tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The first of the rows of a split tensor that this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert is_sharded(tensor)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0])


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is split over the processes."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors put together, one at a time, in host memory: in the processes that ``keep`` them, for saving."""
    result = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor() if is_sharded(tensor) else tensor
        if keep:
            result[name] = value.detach().cpu()
    return result


def gradient_norm(parameters: Sequence[nn.Parameter], total: Callable[[Tensor], None]) -> Tensor:
    """The norm of all gradients. ``total`` sums a tensor over the processes, for the parts of split gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    pieces = [local(g) for g in gradients if is_sharded(g)]
    if not pieces:
        return nn.utils.get_total_norm(gradients)
    squares = torch.stack([g.float().square().sum() for g in pieces]).sum()
    total(squares)
    return (squares + sum(g.float().square().sum() for g in gradients if not is_sharded(g))).sqrt()


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scales the gradients, whose norm is ``norm``, to a norm of at most ``limit``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(is_sharded(g) for g in gradients):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale)
