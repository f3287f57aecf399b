"""The memory of evaluating a network, counted on fake tensors, which have shapes and types but no values.

Every tensor that torch creates during a forward and a backward pass is counted until it is freed, each storage once, so
that the peak includes what autograd keeps, what gradient checkpointing recomputes, autocast's copies of weights, and
temporaries between operations. Workspace inside an operation is not seen, and attention is counted as torch's fused
kernel for CPUs, which keeps what those for GPUs keep.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.models.backbone import Past
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser

# How an evaluation is used: without a graph, with one to the network's parameters, with one to its input alone.
Graph = Literal["none", "parameters", "input"]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of storages created inside this context that are alive: ``now``, and at most, ``peak``.
    ``known`` are tensors from before that are not to be counted."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def to_fake(modules: Iterable[nn.Module], mode: FakeTensorMode) -> None:
    """Replaces all parameters and buffers on the meta device by fake ones on the CPU, in place; tensors that modules
    share stay shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in (part for whole in modules for part in whole.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


@dataclass(frozen=True)
class EvaluationMemory:
    """Bytes of one evaluation: ``kept`` from the forward pass until the backward pass, and the ``peak`` of both."""

    kept: int
    peak: int


def evaluation_memory(
    denoiser: Denoiser, shape: tuple[int, ...], condition: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    batch: int, graph: Graph, *, with_gradients: bool, by_frame: bool = False, mode: FakeTensorMode,
) -> EvaluationMemory:  # fmt: skip
    """The memory of evaluating a fake ``denoiser`` on ``batch`` samples, and of the backward pass if it has a graph.
    ``by_frame``: of evaluating the frames of clips one after the other, with what each is given of those before.

    The peak contains gradients of parameters, unless they exist before, ``with_gradients``. Weights are not counted.
    """
    parameters = list(denoiser.parameters())
    network = getattr(denoiser.backbone, "shared_network", denoiser)
    with mode:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if with_gradients else None
        x = torch.empty(batch, *shape).requires_grad_(graph == "input")
        times = torch.empty(batch, dtype=torch.float64)
        inputs = Condition({name: torch.empty(batch, *size, dtype=t) for name, (size, t) in condition.items()})
        known = [*network.parameters(), *network.buffers(), *(p.grad for p in parameters if p.grad is not None)]
        live = LiveMemory([*known, x, times, *inputs.values()])
        with live, torch.set_grad_enabled(graph != "none"):
            pasts = list[Past]()
            raw = _by_frame(denoiser, x, times, inputs, pasts) if by_frame else denoiser.raw(x, times, inputs)
            kept = live.now
            if graph != "none":
                raw.backward(torch.empty_like(raw), inputs=parameters if graph == "parameters" else [x])
        for parameter in parameters:
            parameter.grad = None
    return EvaluationMemory(kept, live.peak)


def _by_frame(denoiser: Denoiser, x: Tensor, times: Tensor, condition: Condition, pasts: list[Past]) -> Tensor:
    """The predictions of all frames, each given those before; what is known after each is added to ``pasts``."""
    frames: list[Tensor] = []
    for frame in x.split(1, 2):
        past = pasts[-1] if pasts else None
        frames.append(denoiser.after(past, frame, times, condition)[0].x0)
        with torch.no_grad():
            pasts.append(denoiser.after(past, frames[-1].detach(), times, condition)[1])
    return torch.cat(frames, 2)
