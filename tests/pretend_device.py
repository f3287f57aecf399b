"""A pretend accelerator: tensors that say they are on another device, with real values in host memory.

Inside ``PretendDevice()`` operations that mix devices raise as on CUDA, and ``waits`` counts every operation for which
the host would wait for the device, by kind and line:

* ``item``: a device value read by the host (``.item()``, ``bool``, ``float``, ``if tensor:``);
* ``to host``: a copy from the device;
* ``to device``: a blocking copy to the device (without ``non_blocking``);
* ``nonzero``: a size that depends on device values (boolean masks, ``unique``);
* ``index``: indices on the host for a tensor on the device, which torch copies.

``copies`` counts the copies to the device that do not wait. The device's type is torch's ``lazy``, which no back end
uses here. Complex numbers are not differentiated correctly on it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fewstep.core.keyed_random import KeyedRandom

DEVICE = torch.device("lazy")
HOST = torch.device("cpu")
ATEN = torch.ops.aten
SIZES = (ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive)
INDEXING = (ATEN.index, ATEN.index_put_, ATEN.index_put, ATEN._index_put_impl_)


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device; ``values`` are in host memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> PretendTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, dict(kwargs or {}), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = PretendTensor(self.values.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied


class PretendDevice(TorchDispatchMode):
    """Inside this context the pretend device works; ``waits`` and ``copies`` count (kind, line)."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> PretendDevice:
        self._patches.enter_context(_patched())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, dict(kwargs or {}), self)

    def record(self, kind: str) -> None:
        counter = self.copies if kind == "copy" else self.waits
        counter[kind, _line()] += 1


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor of any device, in host memory, without counting a wait."""
    return tensor.values if isinstance(tensor, PretendTensor) else tensor


def _line() -> str:
    """The innermost line of the project (of a library, if none is on the stack) that caused the operation."""
    frame, library = sys._getframe(2), "?"
    while frame is not None:
        file = frame.f_code.co_filename
        if "site-packages/" in file:
            if "/torch/" not in file and library == "?":
                library = f"{file.split('site-packages/')[-1]}:{frame.f_lineno}"
        elif "/src/fewstep/" in file or ("/fewstep/" in file.split("/tests/")[0] and "/tests/" not in file):
            return f"{file.split('/fewstep/')[-1]}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back  # type: ignore[assignment]
    return library


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: PretendDevice | None) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, PretendTensor)]
    hosts = [x for x in tensors if not isinstance(x, PretendTensor)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    created = target is not None and target.type == DEVICE.type
    if created:
        kwargs = {**kwargs, "device": HOST}
    name = function.overloadpacket
    record: Callable[[str], None] = mode.record if mode is not None else lambda kind: None

    if name is ATEN._to_copy:
        source = args[0]
        if isinstance(source, PretendTensor) and target is not None and not created:
            record("to host")
            return function(source.values, **kwargs)
        if not isinstance(source, PretendTensor) and created:
            record("copy" if kwargs.get("non_blocking") else "to device")
            return PretendTensor(function(source, **kwargs))
    elif name is ATEN.copy_:
        to, source = args[:2]
        if isinstance(to, PretendTensor) and not isinstance(source, PretendTensor):
            record("copy" if (len(args) > 2 and args[2]) or kwargs.get("non_blocking") else "to device")
        elif isinstance(source, PretendTensor) and not isinstance(to, PretendTensor):
            record("to host")
        function(values_of(to), values_of(source), *args[2:], **kwargs)
        return to
    elif name is ATEN._local_scalar_dense:
        if ours:
            record("item")
        return function(values_of(args[0]))
    elif name in SIZES and ours:
        record("nonzero")
    elif name in INDEXING:
        _check_indices(function, name, args, record)
        hosts = []
    if ours and hosts:
        _check_devices(function, name, args, ours, hosts)
    output = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if not ours and not created:
        return output
    known = {id(tensor.values): tensor for tensor in ours}  # in-place operations return their argument
    return tree_map(lambda x: known.get(id(x), PretendTensor(x)) if isinstance(x, torch.Tensor) else x, output)


def _unwrapped(x: Any) -> Any:
    return x.values if isinstance(x, PretendTensor) else x


def _check_indices(function: Any, name: Any, args: tuple[Any, ...], record: Callable[[str], None]) -> None:
    tensor, indices = args[0], [index for index in args[1] if index is not None]
    ours = [index for index in indices if isinstance(index, PretendTensor)]
    if isinstance(tensor, PretendTensor):
        if any(index.dtype in (torch.bool, torch.uint8) for index in ours):
            record("nonzero")
        if len(ours) < len(indices):
            record("index")
        if any(isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) and x.ndim for x in args[2:3]):
            raise MixedDevicesError(f"{function}: host values into a device tensor")
    elif ours:
        raise MixedDevicesError(f"{function}: device indices into a host tensor")
    elif name is not ATEN.index and any(isinstance(x, PretendTensor) for x in args[2:3]):
        raise MixedDevicesError(f"{function}: device values into a host tensor")


def _check_devices(
    function: Any, name: Any, args: tuple[Any, ...], ours: list[PretendTensor], hosts: list[torch.Tensor]
) -> None:
    """CUDA's rule: a host tensor without axes may be an operand of an elementwise operation, no other may."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
    into_host = writes and isinstance(args[0], torch.Tensor) and not isinstance(args[0], PretendTensor)
    if into_host or name in (ATEN.cat, ATEN.stack) or any(tensor.ndim for tensor in hosts):
        shapes = [tuple(x.shape) for x in ours], [tuple(x.shape) for x in hosts]
        raise MixedDevicesError(f"{function}: expected one device, got device {shapes[0]} and host {shapes[1]}")


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """What the device type lacks in torch: generators, autocast, inference mode, gradient checkpointing, and fused
    optimizers."""
    generator, autocast = KeyedRandom._generator, torch.autocast

    def on_host(self: KeyedRandom, stream: str, device: torch.device) -> torch.Generator:
        return generator(self, stream, HOST)

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    module = types.SimpleNamespace(
        _initialized=False, is_initialized=lambda: False, current_device=lambda: 0, is_available=lambda: True
    )
    fused = "_get_fused_kernels_supported_devices"
    optimizers = sys.modules["torch.optim.optimizer"]
    devices = [*vars(optimizers)[fused](), DEVICE.type]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(KeyedRandom, "_generator", on_host))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        stack.enter_context(mock.patch.object(torch, DEVICE.type, module, create=True))
        stack.enter_context(mock.patch.object(optimizers, fused, return_value=devices))
        swap, lift = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is created on the host and copied
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
            torch._C._set_only_lift_cpu_tensors(lift)
