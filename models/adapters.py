"""LoRA sets of several roles on one frozen network, chosen by the role that reads (Hu et al., arXiv 2106.09685).

    teacher = Denoiser(share(network, rank=16, alpha=16, targets=["to_q", "to_k", "to_v", "to_out.0"]), schedule, kind)
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)      # a set each, on the same network

PEFT serves to inject the layers only. Its own switch, ``set_adapter``, flips ``requires_grad``: a fake score read
between the student's forward and backward would silently take the student's gradient away. Here every set stays
trainable, and the view that reads decides which one it goes through.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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


def share(base: nn.Module, *, rank: int, alpha: float, targets: str | Sequence[str], seed: int = 0) -> AdapterView:
    """Freezes ``base``, a backbone ``(x_t, t, condition) -> tensor``, and returns the view of it without a LoRA set.

    That view is the teacher; ``fork`` (or ``copy.deepcopy``) makes views with a set of their own. ``targets`` are what
    PEFT takes: ends of module names, or one regular expression. All sets start from the same A, drawn from ``seed``,
    and B = 0, so that averages and blends of them are meaningful; they are float32 whatever the base is.
    """
    base.requires_grad_(False).eval()
    return AdapterView(_Shared(base, rank, alpha, targets, seed), ())


def share_network(denoiser: Denoiser, rank: int, alpha: float | None, targets: Sequence[str] | None) -> Lora:
    """Freezes the network of ``denoiser``, which becomes the view of it without a LoRA set; its copies are adapters.

    A network that already has an adapter is merged first. Returns the settings with defaults filled in: ``alpha`` is
    the rank, ``targets`` the network's own ``lora_targets``. Raises ``UserError`` if these are unknown.
    """
    network = denoiser.backbone
    if isinstance(network, AdapterView):
        network = network.merged()
    if targets is None:
        targets = network.lora_targets if isinstance(network, Backbone) else ()
        if not targets:
            raise UserError(f"Which layers of a {type(network).__name__} should LoRA adapt? Set adapters.targets.")
    lora = Lora(rank=rank, alpha=alpha or rank, targets=tuple(targets))
    denoiser.backbone = share(network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return lora


def checkpoint_gradients(backbone: nn.Module) -> None:
    """Makes a network, and copies made later, recompute its blocks in the backward pass instead of storing activations.

    Raises ``UserError`` for a network that does not support it.
    """
    network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
    if not isinstance(network, Backbone):
        raise UserError(f"gradient_checkpointing is not supported by {type(network).__name__}.")
    network.checkpoint_gradients(backbone.checkpoint if isinstance(backbone, AdapterView) else _recompute)


def _recompute(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


class AdapterView(nn.Module):
    """A backbone ``(x_t, t, condition) -> tensor``: the shared frozen network with one LoRA set active, or none.

    Its parameters and its state dict are those of the set alone, under PEFT's names (``path.lora_A.weight``); the base
    is no child of it. A deep copy is ``fork``. ``to`` moves the network with all its sets. Views of one base must not
    be read from two threads at once.
    """

    def __init__(self, shared: _Shared, names: tuple[str, ...]) -> None:
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
        with self._shared.using(self._names):
            return self._shared.base(x_t, t, condition)  # type: ignore[no-any-return]

    def get_submodule(self, target: str) -> nn.Module:
        """A module of the shared base, where taps are placed."""
        return self._shared.base.get_submodule(target)

    def fork(self) -> AdapterView:
        """A view of the same function with a set of its own: this set's values, or B = 0 where this view has none.

        Raises ``UserError`` if PEFT is not installed or ``targets`` fit no module of the base.
        """
        fork = AdapterView(self._shared, (self._shared.add(),))
        if self._names:
            fork.load_state_dict(self.state_dict())
        return fork

    def merged(self) -> nn.Module:
        """A plain network of its own that computes what this view does: its set added to a copy of the weights, in
        float32 and then in the base's type."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        copied = copy.deepcopy(self._shared.base)
        for path, layer in list(copied.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                inner = layer.get_base_layer()
                dtype = next(inner.parameters()).dtype
                inner.float()
                layer.merge(adapter_names=list(self._names))
                parent, _, name = path.rpartition(".")
                setattr(copied.get_submodule(parent), name, inner.to(dtype))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterView:
        return self.fork()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterView:
        # the sets are parameters of layers inside the base, so this moves them too, in place
        self._shared.base._apply(fn, recurse)
        return self

    @property
    def shared_network(self) -> nn.Module:
        """The shared network, with the LoRA layers of all sets."""
        return self._shared.base

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Gradient checkpointing that recomputes under the set of the forward, whichever is active by then.

        Give it (of any view of the base) to diffusers' ``enable_gradient_checkpointing``; without it recomputation runs
        under no set or a wrong one: a ``CheckpointError`` at best, wrong gradients at worst.
        """
        names = tuple(self._shared.active)
        return checkpoint(
            function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._shared.using(names))
        )


class _Shared:
    """The network, its LoRA layers, and which sets are active in all of them (none: the bare network).

    What is active stands in one list that every layer holds, so that a switch costs the same for any number of layers.
    It is no context variable: autograd's own threads, in which a GPU's backward recomputes, do not see the caller's.
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

    def add(self) -> str:
        """Injects one more set and returns its name."""
        prepare_torchvision()
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise UserError("LoRA roles need PEFT: pip install 'fewstep[lora]'.") from error
        name, self._count = f"set{self._count}", self._count + 1
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several sets are the point
            torch.default_generator.manual_seed(self._seed)
            try:
                inject_adapter_in_model(LoraConfig(**self._settings), self.base, name)
            except ValueError as error:
                raise UserError(f"LoRA cannot be added to this network: {error}") from error
        self._layers = {path: m for path, m in self.base.named_modules() if isinstance(m, BaseTunerLayer)}
        for layer in self._layers.values():  # injecting activated the new set and changed flags of the others
            layer._active_adapter = self.active
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        for _, parameter in self.parameters([name]):
            parameter.data = parameter.data.float()
        return name

    def parameters(self, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of these sets, by the name that PEFT's files give them."""
        for name in names:
            for path, layer in self._layers.items():
                yield f"{path}.lora_A.weight", layer.lora_A[name].weight
                yield f"{path}.lora_B.weight", layer.lora_B[name].weight

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[None]:
        """Within it the network runs with these sets."""
        before = tuple(self.active)
        self.active[:] = names
        try:
            yield
        finally:
            self.active[:] = before
