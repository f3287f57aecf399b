"""The networks in training, by name: teacher, student, fake, discriminator, reference, experts, or any other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.distill import sharding
from fewstep.distill.stop_requests import undisturbed
from fewstep.models.adapters import AdapterView
from fewstep.models.backbone import Past
from fewstep.models.condition import Condition
from fewstep.models.cuda_graphs import GraphedDenoiser
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.guidance import UNGUIDED, Guidance, Guided, guide
from fewstep.models.offload import OffloadedModule
from fewstep.models.prediction import Prediction

AT_ONCE = 32  # parameters whose averages are updated by the same kernels, which need memory for as many


@dataclass
class Role:
    """One network. Its trainable state is ``module.parameters()``: all of a copy, or the adapter on a shared base.

    ``optimizer`` is None for a frozen role. ``lr_factor(n)`` multiplies the learning rate of the n-th update.
    ``average`` holds the exponential moving average of the parameters, with the decay
    ``min(ema_decay, (1 + n) / (10 + n))`` after n updates.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    lr_factor: Callable[[int], float] = lambda n: 1.0
    ema_decay: float = 0.0
    updates: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ema_decay and not self.average:
            self.average = {name: p.detach().clone() for name, p in self.module.named_parameters()}

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters. They are the same tensors for the role's life, and an update asks for them often."""
        return list(self.module.parameters())

    @property
    def skips(self) -> bool:
        """Whether its optimizer can skip a step on the device: a fused one can."""
        return self.optimizer is not None and bool(self.optimizer.defaults.get("fused"))

    @torch.no_grad()
    def step(self, lost: Tensor | None = None) -> None:
        """One optimizer step on the present gradients, then the update of the average. An optimizer that ``skips``
        skips it, and the average stays, if ``lost``, 0-d on the device, is 1; ``updates`` counts it nevertheless."""
        assert self.optimizer is not None, "a frozen role cannot step"
        if self.skips:  # as torch's GradScaler tells fused optimizers, which keep it for the next step
            self.optimizer.found_inf, self.optimizer.grad_scale = lost, None  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_factor(self.updates)
        self.optimizer.step()
        self.updates += 1
        if self.ema_decay:
            decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
            live: list[Tensor] = [parameter.detach() for parameter in self.parameters]
            average = list(self.average.values())
            if lost is None:
                torch._foreach_lerp_(average, live, 1 - decay)
            else:
                here, new = [sharding.local(mean) for mean in average], [sharding.local(tensor) for tensor in live]
                weight = (1 - decay) * (1 - lost)
                for few in (slice(first, first + AT_ONCE) for first in range(0, len(here), AT_ONCE)):
                    way = torch._foreach_sub(new[few], here[few])  # a lerp by a tensor is one kernel for each parameter
                    torch._foreach_mul_(way, weight)
                    torch._foreach_add_(here[few], way)

    def add_missing_gradients(self) -> None:
        """Adds gradients of zero to experts by noise level that no sample of this process reached, as samples of other
        processes may have."""
        backbone = self.module.backbone if isinstance(self.module, Denoiser) else None
        network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
        for parameter in self.parameters if isinstance(network, Routed) else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context the module has its averaged weights (its own, if there is no average)."""
        if not self.average:
            yield
            return
        live = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        try:
            with undisturbed():
                self._load(self.average)
            yield
        finally:
            with undisturbed():
                self._load(live)

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(values[name])


@torch.no_grad()
def blend(role: Role, towards: Role, share: float) -> None:
    """Interpolates the parameters of a role towards those of another by ``share``; both must be copies (see
    ``require_blendable``)."""
    torch._foreach_lerp_([p.detach() for p in role.parameters], [p.detach() for p in towards.parameters], share)


def require_blendable(roles: Roles, *names: str) -> None:
    """Raises ``UserError`` unless these roles are copies of one network: other networks have no common parameters, and
    the product of averaged LoRA factors is not the average of their products, which has twice the rank."""
    adapters = [name for name in names if isinstance(roles.denoiser(name).backbone, AdapterView)]
    if adapters:
        raise UserError(
            f"blend interpolates {' and '.join(names)}, but these train adapters: {' and '.join(adapters)}. "
            "Averaged LoRA factors are not an averaged network. Set blend: 0, or full_finetune: true for both roles."
        )
    shapes = {tuple(p.shape for p in roles[name].parameters) for name in names}
    if len(shapes - {()}) > 1:  # a network in closed form has no parameters
        raise UserError(
            f"blend interpolates {' and '.join(names)}, but these are different networks. Set blend: 0, or let both "
            "start from the same one."
        )


class Roles(Mapping[str, Role]):
    """The roles of a stage by name, and the one way to evaluate their networks. ``evaluations`` counts the samples that
    were evaluated, guided ones twice; a video that is evaluated frame by frame counts with its first frame. With
    ``split``, networks are split over the processes, which must evaluate each of them equally often."""

    def __init__(self, roles: Mapping[str, Role], precision: torch.dtype = torch.float32) -> None:
        self._roles = dict(roles)
        self._offloaded: dict[str, OffloadedModule] = {}
        self._graphed: dict[str, GraphedDenoiser] = {}
        self._updating: frozenset[str] = frozenset()
        self._precision = precision
        self.evaluations = 0
        self.split = any(isinstance(r.module, Denoiser) and sharding.is_split(r.module) for r in roles.values())

    @property
    def precision(self) -> torch.dtype:
        """The type in which networks compute."""
        return self._precision

    def __getitem__(self, name: str) -> Role:
        try:
            return self._roles[name]
        except KeyError:
            raise KeyError(f"no role {name!r}; this stage has {', '.join(self._roles)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def denoiser(self, name: str) -> Denoiser:
        """The role's network. Raises ``TypeError`` if it is not a denoiser (the heads of a discriminator)."""
        module = self[name].module
        if not isinstance(module, Denoiser):
            raise TypeError(f"the role {name!r} is a {type(module).__name__}, not a Denoiser")
        return module

    def require_both_branches(self, name: str, objective: str) -> None:
        """Raises ``UserError`` if the role's network is evaluated once for both branches of guidance."""
        if self.denoiser(name).style.embedded:
            raise UserError(
                f"{objective} needs the conditional and the unconditional prediction of the {name}, but guidance is an "
                "input of this network (it is guidance-distilled), so it has no unconditional one. Use an objective "
                "that needs only the guided prediction."
            )

    @contextmanager
    def updating(self, names: Sequence[str]) -> Iterator[None]:
        """Inside this context only the parameters of these roles require gradients, and ``predict`` records a graph to
        them. The flags hold for a whole update, with every recomputation in it."""
        flags = [(p, p.requires_grad) for role in self.values() for p in role.parameters]
        trained = {id(p) for name in names for p in self[name].parameters}
        before, self._updating = self._updating, frozenset(names)
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in trained)
        try:
            yield
        finally:
            self._updating = before
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for network in self._offloaded.values():  # the update's graphs needed them until now
                network.release()

    def offload(self, names: Collection[str], device: torch.device) -> None:
        """From now on keeps the networks of these frozen roles in host memory and fetches them for each evaluation."""
        self._offloaded = {name: OffloadedModule(self[name].module, device) for name in names}

    def record_evaluations(self) -> None:
        """From now on ``predict`` replays recorded evaluations, on a GPU (``models.cuda_graphs``)."""
        denoisers = {name: role.module for name, role in self.items() if isinstance(role.module, Denoiser)}
        pool = torch.cuda.graph_pool_handle()
        self._graphed = {name: GraphedDenoiser(denoiser, pool) for name, denoiser in denoisers.items()}

    @contextmanager
    def without_recordings(self) -> Iterator[None]:
        """Inside this context the layers of networks run one by one, for hooks that look at them."""
        recorded, self._graphed = self._graphed, {}
        try:
            yield
        finally:
            self._graphed = recorded

    def fetch(self) -> None:
        """Moves all networks to the device."""
        for network in self._offloaded.values():
            network.fetch()

    @contextmanager
    def resident(self, name: str) -> Iterator[Denoiser]:
        """The role's network, on the device inside this context; with gradients enabled, until the update is over."""
        if name in self._offloaded:
            self._offloaded[name].fetch()
        try:
            yield self.denoiser(name)
        finally:
            if name in self._offloaded and not torch.is_grad_enabled():
                self._offloaded[name].release()

    def is_updating(self, name: str) -> bool:
        return name in self._updating

    def predict(
        self, role: str, x_t: Tensor, t: Tensor | float, condition: Condition, *, guidance: Guidance = UNGUIDED,
        input_grad: bool | Literal["cond"] = False,
    ) -> Guided:  # fmt: skip
        """The role's prediction at ``x_t`` [B, ...] and ``t`` [B], with its conditional and unconditional parts.

        A graph is recorded only if the role is being updated, or if ``input_grad`` requests one to ``x_t`` (SiD, GAN
        terms): ``cond`` through the conditional part alone, which halves what is kept in memory with guidance.
        Parameters of other roles require no gradients in an update, so none are left on them.
        """
        graph = nullcontext() if input_grad or role in self._updating else torch.no_grad()
        with graph, self._autocast(x_t.device), self.resident(role) as denoiser:
            denoiser = self._graphed.get(role, denoiser)
            guided = guide(denoiser, x_t, t, condition, guidance, null_graph=input_grad != "cond")
        self.evaluations += len(x_t) * (1 if guided.null is None else 2)
        return guided

    def after(
        self, role: str, past: Past | None, x_t: Tensor, t: Tensor | float, condition: Condition
    ) -> tuple[Prediction, Past]:
        """The role's prediction for frames ``x_t`` [B, C, F, H, W] that follow those of ``past``, None at the start,
        and the past of the frames after them (``Denoiser.after``); with a graph only if the role is being updated."""
        graph = nullcontext() if role in self._updating else torch.no_grad()
        with graph, self._autocast(x_t.device), self.resident(role) as denoiser:
            prediction, after = denoiser.after(past, x_t, t, condition)
        if past is None:
            self.evaluations += len(x_t)
        return prediction, after

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._precision, enabled=self._precision != torch.float32)
