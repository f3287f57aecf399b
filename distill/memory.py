"""The memory of a run per device, planned from its config: no weights, no data, nothing downloaded.

    total = weights + moments + averages of all roles + CUDA graphs, if there are any
            + the most at any moment of gradients, activations and temporaries

Roles are built on the meta device by the code that training uses, so that weights, float32 copies, adapters and
averages are counted, not estimated. What happens in a step (which evaluations, with which graphs alive and which
gradients held) is observed in the training loop with stand-in networks; what an evaluation costs is counted on fake
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.core.errors import UserError
from fewstep.distill.build import DTYPES
from fewstep.distill.config import Config
from fewstep.distill.planned_stages import PlannedStage, planned_stages
from fewstep.distill.processes import GROUP
from fewstep.distill.roles import Role
from fewstep.distill.sharded_memory import Shards
from fewstep.distill.snapshots import Evaluated
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser
from fewstep.models.live_memory import EvaluationMemory, evaluation_memory, to_fake
from fewstep.models.quantized import is_quantized, quantized_bytes

FLOAT = 4  # bytes


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one role: its own weights, and if it is trained their gradients, moments and moving average."""

    weights: int
    gradients: int = 0
    moments: int = 0
    average: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device in a stage. ``resident`` are weights, moments, averages and CUDA graphs; ``peaks`` is what is
    needed besides, by what happens: gradients, activations, temporaries, and weights fetched from host memory."""

    stage: int
    roles: Mapping[str, RoleMemory]
    resident: int
    peaks: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.resident + max(self.peaks.values())

    @property
    def worst(self) -> str:
        """What happens when the most memory is needed."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types, in bytes."""
        roles = {name: dict(vars(role)) for name, role in self.roles.items()}
        return {
            "stage": self.stage, "roles": roles, "resident": self.resident,
            "peaks": dict(self.peaks), "total": self.total,
        }  # fmt: skip


def plan_memory(config: Config, devices: int = 1, costs: Cost | None = None) -> MemoryPlan:
    """The plan of the stage that needs the most, on each of ``devices`` with a process. ``costs`` remembers evaluations
    between calls.

    Raises ``UserError`` if the network of the config is not known, if its stages cannot be built, and if the devices
    cannot share its micro-batches equally.
    """
    if config.accumulate % devices:
        raise UserError(
            f"accumulate = {config.accumulate} must be a multiple of the {devices} devices, which share it. Set "
            f"accumulate={config.accumulate + -config.accumulate % devices}."
        )
    config = config.model_copy(update={"accumulate": config.accumulate // devices})
    costs = Costs() if costs is None else costs
    stages = list(planned_stages(config))  # before fake tensors, of which torch warns when a later stage copies them
    plans = [_plan_stage(config, stage, devices, costs) for stage in stages]
    return max(plans, key=lambda plan: plan.total)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def adamw_bytes(sizes: Iterable[int], bits8: bool) -> int:
    """Bytes of AdamW's two moments for parameters with these numbers of elements: float32, or 8 bits with a float32
    scale for each block of 256, for parameters of 4096 elements or more (arXiv 2110.02861)."""
    return sum(
        2 * (n + FLOAT * math.ceil(n / 256)) if bits8 and n >= 4096 else 2 * FLOAT * n for n in sizes
    )  # fmt: skip


def step_bytes(sizes: Iterable[int]) -> int:
    """Temporaries of an AdamW step that updates one parameter after the other (a fused one has none): two of one,
    beside one of that before it."""
    return FLOAT * max(2 * n + before for before, n in pairwise([0, *sizes]))


def own_tensors(roles: Mapping[str, Role]) -> dict[str, list[Tensor]]:
    """The weights of each role, each tensor once: a shared base belongs to the first role that views it."""
    seen: set[int] = set()

    def new(module: nn.Module) -> list[Tensor]:
        tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in seen]
        seen.update(map(id, tensors))
        return tensors

    own = {name: new(role.module) for name, role in roles.items()}
    for name, role in roles.items():
        if isinstance(role.module, Denoiser) and isinstance(role.module.backbone, AdapterView):
            own[name] += new(role.module.backbone.shared_network)
    return own


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- plans ------------------------------------------------------------------------------------------------------------


def _plan_stage(config: Config, stage: PlannedStage, devices: int, costs: Cost) -> MemoryPlan:
    roles, settings = stage.roles, config.stages[stage.number].roles
    memory: dict[str, RoleMemory] = {}
    own = own_tensors(roles)
    shards = Shards.of(roles, devices) if config.shard and devices > 1 else Shards()
    for name, role in roles.items():
        weights = _base_bytes(role, config.weights) or shards.nbytes(own[name])
        if role.optimizer is None:
            memory[name] = RoleMemory(weights)
            continue
        sizes = [shards.elements(parameter) for parameter in role.parameters]
        gradients = shards.nbytes(role.parameters)
        moments = adamw_bytes(sizes, settings[name].optimizer == "adamw8bit")
        memory[name] = RoleMemory(weights, gradients, moments, gradients if role.average else 0)
    offloaded = stage.frozen if config.offload else frozenset()
    resident = sum(
        (0 if name in offloaded else role.weights) + role.moments + role.average for name, role in memory.items()
    )
    resident += _recordings(config, stage, costs) if config.cuda_graphs else 0
    return MemoryPlan(stage.number, memory, resident, _needs(config, stage, memory, offloaded, shards, devices, costs))


def _recordings(config: Config, stage: PlannedStage, costs: Cost) -> int:
    """At most so many bytes are kept by CUDA graphs: a recorded evaluation with a graph has memory of its own, also for
    its gradients, and the others share theirs."""
    evaluations = {snapshot.evaluation for snapshot in stage.snapshots if not snapshot.evaluation.by_frame}
    needs = {
        evaluation: costs(config, stage, evaluation, evaluation.graph == "none").peak for evaluation in evaluations
    }
    shared = max((size for evaluation, size in needs.items() if evaluation.graph == "none"), default=0)
    return shared + sum(size for evaluation, size in needs.items() if evaluation.graph != "none")


def _base_bytes(role: Role, weights: Literal["float32", "bfloat16", "int8", "nf4"]) -> int:
    """Bytes of a quantized base, for the role that holds it; 0 for others."""
    backbone = role.module.backbone if isinstance(role.module, Denoiser) else None
    if (
        weights == "float32"
        or weights == "bfloat16"
        or not isinstance(backbone, AdapterView)
        or list(backbone.parameters())
    ):
        return 0
    modules = backbone.shared_network.named_modules()
    linear = [(path, layer) for path, layer in modules if isinstance(layer, nn.Linear)]
    layers = [layer for path, layer in linear if is_quantized(path, layer) and not layer.weight.requires_grad]
    quantized = {id(tensor) for layer in layers for tensor in layer.parameters()}
    rest = [p for p in backbone.shared_network.parameters() if id(p) not in quantized and not p.requires_grad]
    sizes = [quantized_bytes(layer, weights) for layer in layers]
    return nbytes(rest) + sum(sizes)


def _needs(
    config: Config, stage: PlannedStage, memory: Mapping[str, RoleMemory], offloaded: frozenset[str], shards: Shards,
    devices: int, costs: Cost,
) -> dict[str, int]:  # fmt: skip
    """The bytes that are needed besides what is resident, by what happens."""
    needs: dict[str, int] = {}

    def need(what: str, size: int) -> None:
        needs[what] = max(needs.get(what, 0), size)

    def cost(evaluation: Evaluated, with_gradients: bool) -> EvaluationMemory:
        return costs(config, stage, evaluation, with_gradients)

    for snapshot in stage.snapshots:
        trained = snapshot.evaluation.graph == "parameters"
        held = snapshot.gradients & memory.keys()
        if trained:
            held |= {snapshot.evaluation.role} & shards.trained  # the others' rows of its gradients are sent at once
        size = sum(memory[role].gradients for role in held)
        size += sum(cost(other, True).kept for other in snapshot.alive)
        size += cost(snapshot.evaluation, not trained or snapshot.evaluation.role in held).peak
        used = {evaluation.role for evaluation in (snapshot.evaluation, *snapshot.alive)}
        size += sum(memory[role].weights for role in used & offloaded)
        size += shards.gathered(snapshot.evaluation.role, snapshot.evaluation.graph)
        need(f"{snapshot.evaluation.role} evaluated in the update {snapshot.update}", size)
    fused = config.device != "cpu"
    for update, names in stage.updates.items():
        gradients = sum(memory[role].gradients for role in names)  # those of the update before have been freed
        for name in names:
            bits8 = config.stages[stage.number].roles[name].optimizer == "adamw8bit"
            sizes = [shards.elements(parameter) for parameter in stage.roles[name].parameters]
            need(f"optimizer step of {name}", gradients + (0 if bits8 or fused else step_bytes(sizes)))
        if sent := sum(memory[role].gradients for role in names if role not in shards.trained) if devices > 1 else 0:
            need(f"mean over devices in the update {update}", gradients + min(sent, FLOAT * GROUP))
    if "student" in memory and (config.health.every or config.validation.every):  # two sets of its weights are held
        size = max(sum(memory[role].gradients for role in names) for names in stage.updates.values())
        size += memory["student"].average + shards.gathered("student", "none")
        need("samples of the averaged student", size + cost(Evaluated("student", 1, "none"), True).peak)
    if offloaded:
        frozen = sum(memory[role].weights for role in offloaded)
        need("start of the stage", frozen - sum(role.moments for role in memory.values()))
    return needs


# --- costs ----------------------------------------------------------------------------------------------------------

Cost = Callable[[Config, PlannedStage, Evaluated, bool], EvaluationMemory]


class Costs:
    """The memory of evaluations, each counted once. For micro-batches smaller than the first config's, it is
    interpolated between that of one sample and that of the first config, which is not less than the actual one: the
    peak is the largest of several amounts that are linear in the batch."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], EvaluationMemory] = {}
        self._largest = 0
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __call__(
        self, config: Config, stage: PlannedStage, evaluation: Evaluated, with_gradients: bool
    ) -> EvaluationMemory:
        self._largest = self._largest or config.batch
        most = self._exact(config, stage, evaluation, with_gradients, self._largest)
        if config.batch == self._largest:
            return most
        least = self._exact(config, stage, evaluation, with_gradients, 1)
        share = (config.batch - 1) / (self._largest - 1)
        return EvaluationMemory(
            round(least.kept + share * (most.kept - least.kept)), round(least.peak + share * (most.peak - least.peak))
        )

    def _exact(
        self, config: Config, stage: PlannedStage, evaluation: Evaluated, with_gradients: bool, batch: int
    ) -> EvaluationMemory:
        denoiser = stage.roles[evaluation.role].module
        assert isinstance(denoiser, Denoiser)
        of_network = (
            config.weights, config.precision, config.adapters, config.gradient_checkpointing,
            type(denoiser.backbone), *((p.numel(), p.dtype) for p in denoiser.parameters()),
        )  # fmt: skip
        size = evaluation.batches * batch
        key = (*of_network, size, evaluation.graph, evaluation.by_frame, with_gradients)
        if key not in self._known:
            self._convert(stage)
            denoiser.precision = DTYPES[config.precision]
            self._known[key] = evaluation_memory(
                denoiser, stage.network.shape, stage.network.condition, size, evaluation.graph,
                with_gradients=with_gradients, by_frame=evaluation.by_frame, mode=self._mode,
            )  # fmt: skip
        return self._known[key]

    def _convert(self, stage: PlannedStage) -> None:
        networks: list[nn.Module] = []
        for role in stage.roles.values():
            networks.append(role.module)
            if isinstance(role.module, Denoiser) and isinstance(role.module.backbone, AdapterView):
                networks.append(role.module.backbone.shared_network)
        to_fake(networks, self._mode)
