"""Finds where numbers stop being finite: the network, layer and sample that produce the first NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fewstep.core.errors import UserError
from fewstep.core.finite import first_non_finite
from fewstep.distill.roles import Role
from fewstep.distill.sharding import local
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser


def require_finite(name: str, role: Role) -> None:
    """Raises ``UserError`` if a weight of a network that training starts from is not finite."""
    weights = {name: local(tensor) for name, tensor in _network(role.module).state_dict().items()}
    if tensor := first_non_finite(weights):
        raise UserError(f"The weights of the {name} are damaged: {tensor} has numbers that are not finite.")


def locate(roles: Mapping[str, Role], repeat: Callable[[], object], batch: int) -> str | None:
    """Calls ``repeat``, which evaluates the roles on micro-batches of ``batch``, and describes the first output of a
    layer that is not finite; None if all are."""
    names = {
        id(module): (role, name or "the network")
        for role, entry in reversed(list(roles.items()))  # a network that several roles share is the first one's
        for name, module in _network(entry.module).named_modules()
    }
    owners = {id(entry.module): role for role, entry in roles.items()}
    current, found = "", ""

    def before(module: nn.Module, inputs: Any) -> None:
        nonlocal current
        current = owners.get(id(module), current)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal found
        if found or id(module) not in names or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        bad = (~output.isfinite()).reshape(len(output), -1).any(1) if output.ndim else ~output.isfinite()[None]
        if not bad.any():
            return
        role, layer = names[id(module)]
        given = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        sample = int(bad.nonzero()[0]) % batch
        if (weight := first_non_finite(_own_weights(module))) is not None:
            cause = f"its {weight} is not finite"
        elif all(x.isfinite().all() for x in given):
            cause = f"its inputs, up to {max((x.abs().max().item() for x in given), default=0):.3g}, and weights are"
        else:
            cause = "nor is its input"
        found = f"the output of {layer} in the {current or role} is not finite for sample {sample}: {cause}"

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        repeat()
    finally:
        for hook in hooks:
            hook.remove()
    return found or None


def _own_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(parameter) for name, parameter in module.named_parameters(recurse=False)}


def _network(module: nn.Module) -> nn.Module:
    """The network that computes: of adapters, the shared one."""
    if isinstance(module, Denoiser):
        module = module.backbone
    return module.shared_network if isinstance(module, AdapterView) else module
