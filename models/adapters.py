"""LoRA adapters of several roles on one shared, frozen network (Hu et al., arXiv 2106.09685).

    teacher = Denoiser(share_base(network, rank=16, alpha=16, targets=["to_q", "to_k", "to_v"]), schedule, kind)
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)      # one adapter each, on the same network

PEFT only injects the layers. Its own switch, ``set_adapter``, flips ``requires_grad``: evaluating the fake score
between the student's forward and backward would silently discard the student's gradient. Here all adapters stay
trainable, and each view activates its own while it runs.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.core.errors import UserError
from fewstep.core.torchvision_compat import prepare_torchvision
from fewstep.models.backbone import Backbone
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import Lora


def share_base(base: nn.Module, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int = 0) -> AdapterView:
    """Freezes ``base``, a backbone ``(x_t, t, condition) -> tensor``, and returns a view of it without an adapter.

    That view is the teacher; ``fork`` (or ``copy.deepcopy``) creates views with an adapter each. ``targets`` follow
    PEFT: suffixes of module names, or one regular expression. All adapters start from the same A, sampled with
    ``seed``, and B = 0, so that averages of them are meaningful; they are float32 whatever the dtype of the base.
    """
    base.requires_grad_(False).eval()
    return AdapterView(_SharedBase(base, rank, alpha, targets, seed), ())


def share_network(denoiser: Denoiser, rank: int, alpha: float | None, targets: Sequence[str] | None) -> Lora:
    """Freezes the network of ``denoiser`` and replaces it by a view without an adapter; copies then get one each.

    A network that already has an adapter is merged first. Returns the settings with defaults filled in: ``alpha`` is
    the rank, ``targets`` the network's ``lora_targets``. Raises ``UserError`` if the network defines none.
    """
    network = denoiser.backbone
    if isinstance(network, AdapterView):
        network = network.merged()
    if targets is None:
        targets = network.lora_targets if isinstance(network, Backbone) else ()
        if not targets:
            raise UserError(f"Which layers of a {type(network).__name__} should LoRA adapt? Set adapters.targets.")
    lora = Lora(rank=rank, alpha=alpha or rank, targets=tuple(targets))
    denoiser.backbone = share_base(network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return lora


def checkpoint_gradients(backbone: nn.Module) -> None:
    """Makes a network and its later copies recompute blocks in the backward pass instead of storing activations.

    Raises ``UserError`` if the network does not support it.
    """
    network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
    if not isinstance(network, Backbone):
        raise UserError(f"gradient_checkpointing is not supported by {type(network).__name__}.")
    network.checkpoint_gradients(backbone.checkpoint if isinstance(backbone, AdapterView) else _recompute)


def _recompute(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


class AdapterView(nn.Module):
    """A backbone ``(x_t, t, condition) -> tensor``: the shared frozen network with one adapter active, or none.

    Its parameters and state dict are those of the adapter alone, under PEFT's names (``path.lora_A.weight``); the base
    is not a submodule. A deep copy is a ``fork``. ``to`` moves the base with all adapters. Views of one base must not
    run in two threads at once.
    """

    def __init__(self, shared: _SharedBase, names: tuple[str, ...]) -> None:
        super().__init__()
        self._shared = shared
        self._names = names
        for path, parameter in shared.parameters(names):
            *parents, leaf = path.split(".")
            holder: nn.Module = self
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = getattr(holder, parent)
            holder.register_parameter(leaf, parameter)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self._shared.activate(self._names):
            return self._shared.base(x_t, t, condition)  # type: ignore[no-any-return]

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule of the shared base, which is where feature hooks belong."""
        return self._shared.base.get_submodule(target)

    def fork(self) -> AdapterView:
        """A view that computes the same with a new adapter: a copy of this view's, or B = 0 if it has none. The adapter
        lives as long as the view.

        Raises ``UserError`` if PEFT is not installed or ``targets`` match no module of the base.
        """
        name = self._shared.add_adapter()
        fork = AdapterView(self._shared, (name,))
        weakref.finalize(fork, self._shared.remove_adapter, name).atexit = False  # roles are replaced between stages
        if self._names:
            fork.load_state_dict(self.state_dict())
        return fork

    def merged(self) -> nn.Module:
        """A new network without LoRA layers that computes the same: the adapter is added to a copy of the weights in
        float32, layer by layer, and the sum is cast to their dtype. All other tensors are those of the shared network,
        not copies."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        base = self._shared.base
        copied = copy.deepcopy(base, {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())})
        for path, layer in list(copied.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                inner: Any = layer.get_base_layer()
                weight = inner.weight
                inner.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), weight.requires_grad)
                layer.merge(adapter_names=list(self._names))
                inner.weight.data = inner.weight.data.to(weight.dtype)
                parent, _, name = path.rpartition(".")
                setattr(copied.get_submodule(parent), name, inner)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterView:
        return self.fork()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterView:
        # adapters are parameters of layers inside the base, so this moves them too, in place
        self._shared.base._apply(fn, recurse)
        return self

    @property
    def shared_network(self) -> nn.Module:
        """The shared network, with the LoRA layers of all adapters."""
        return self._shared.base

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Gradient checkpointing that recomputes with the adapter of the forward pass, whichever is active by then.

        Pass it (of any view of the base) to diffusers' ``enable_gradient_checkpointing``. Otherwise recomputation uses
        no adapter or another one: a ``CheckpointError`` at best, wrong gradients at worst.
        """
        names = tuple(self._shared.active)
        return checkpoint(
            function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._shared.activate(names))
        )


class _SharedBase:
    """The network, its LoRA layers, and the names of the adapters active in all of them (none: the bare network).

    All layers hold the same list of active names, so that switching costs the same for any number of layers. It is not
    a context variable, because autograd's threads, in which a GPU's backward recomputes, do not inherit the caller's.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> None:
        self.base = base
        self.active: list[str] = []
        self._settings: dict[str, Any] = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": targets if isinstance(targets, str) else list(targets),
        }
        self._seed = seed
        self._layers: dict[str, Any] = {}
        self._count = 0

    def add_adapter(self) -> str:
        """Injects a new adapter and returns its name."""
        prepare_torchvision()
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise UserError("LoRA roles need PEFT: pip install 'fewstep[lora]'.") from error
        name, self._count = f"adapter{self._count}", self._count + 1
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are intended
            torch.default_generator.manual_seed(self._seed)
            try:
                inject_adapter_in_model(LoraConfig(**self._settings), self.base, name)
            except ValueError as error:
                raise UserError(f"LoRA cannot be added to this network: {error}") from error
        self._layers = {path: m for path, m in self.base.named_modules() if isinstance(m, BaseTunerLayer)}
        for layer in self._layers.values():  # injection activated the new adapter and changed flags of the others
            layer._active_adapter = self.active
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        for _, parameter in self.parameters([name]):
            parameter.data = parameter.data.float()
        return name

    def remove_adapter(self, name: str) -> None:
        """Frees an adapter."""
        for layer in self._layers.values():
            layer.delete_adapter(name)

    def parameters(self, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of these adapters, under their names in PEFT's files."""
        for name in names:
            for path, layer in self._layers.items():
                yield f"{path}.lora_A.weight", layer.lora_A[name].weight
                yield f"{path}.lora_B.weight", layer.lora_B[name].weight

    @contextmanager
    def activate(self, names: Sequence[str]) -> Iterator[None]:
        """Runs the network with these adapters inside the context."""
        before = tuple(self.active)
        self.active[:] = names
        try:
            yield
        finally:
            self.active[:] = before
