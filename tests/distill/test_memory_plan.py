"""The memory of a run, planned: closed forms, what torch holds, and the peak of training."""

from __future__ import annotations

import gc
import importlib.util
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from planned_runs import FASHION, config, free
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.core.errors import UserError
from fewstep.distill.config import Config
from fewstep.distill.explain import stand_in_trainer
from fewstep.distill.memory import adamw_bytes, plan_memory, step_bytes
from fewstep.distill.roles import Role
from fewstep.distill.sharded_memory import Shards
from fewstep.distill.snapshots import Evaluated, snapshots
from fewstep.distill.stage import RoleConfig, make_role
from fewstep.models.backbone import Past
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.live_memory import EvaluationMemory, LiveMemory, evaluation_memory, to_fake
from fewstep.models.quantized import quantize, quantized_bytes
from fewstep.models.schedules import RectifiedFlow
from fewstep.models.skeleton import META
from fewstep.models.video_unet import VideoUNet

# --- counting ---------------------------------------------------------------------------------------------------------


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    before = torch.ones(100)
    with LiveMemory([before]) as live:
        first = torch.ones(10)
        second = first.reshape(2, 5)[1:]
        assert live.now == 40
        third = before[3:] + 1
        assert live.now == live.peak == 40 + 4 * 97
        del first
        assert live.now == 40 + 4 * 97, "a view of it is alive"
        del second, third
        gc.collect()
    assert (live.now, live.peak) == (0, 40 + 4 * 97)


class TwoLayers(nn.Module):
    """[B, 8] -> [B, 8] by way of 32 features."""

    sizes: ClassVar = (8, 32)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.down(torch.sigmoid(self.up(x)))
        return out


def test_an_evaluation_keeps_what_autograd_saves() -> None:
    """Of a batch of 16: sigmoid's output is kept, of 32 features; the output has 8. In the backward pass, the gradients
    of the weights of ``down``, then of sigmoid's output and input are added."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with META:
        denoiser = Denoiser(TwoLayers(), RectifiedFlow())
    to_fake([denoiser], mode)
    found = {
        (graph, held): evaluation_memory(denoiser, (8,), {}, 16, graph, with_gradients=held, mode=mode)
        for graph in ("none", "parameters", "input")
        for held in (False, True)
    }
    wide, narrow, weights = 16 * 32 * 4, 16 * 8 * 4, 8 * 32 * 4
    assert found["parameters", False].kept == wide + narrow
    assert found["none", True] == found["none", False] == EvaluationMemory(narrow, 2 * wide)
    # the output and its gradient, sigmoid's output, the gradients of sigmoid's output and input
    assert found["input", False].peak == 3 * wide + 2 * narrow
    assert found["parameters", True].peak == 3 * wide + 2 * narrow, "a new gradient is added to the one held, and freed"
    assert found["parameters", False].peak == 3 * wide + 2 * narrow + weights, "the gradient of down is held"


@pytest.mark.parametrize("sizes", [[10], [4095, 4096, 5000, 70_000]])
def test_moments_are_those_of_the_optimizers(sizes: list[int]) -> None:
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    optimizers = [torch.optim.AdamW(parameters)]
    if find_spec("bitsandbytes"):
        import bitsandbytes

        optimizers.append(bitsandbytes.optim.AdamW8bit(parameters))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for bits8, optimizer in enumerate(optimizers):
        optimizer.step()
        held = [t for state in optimizer.state.values() for name, t in state.items() if isinstance(t, Tensor)
                and name not in ("step", "qmap1", "qmap2")]  # fmt: skip
        assert sum(t.nbytes for t in held) == adamw_bytes(sizes, bool(bits8))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_needs_two_copies_of_the_largest_parameter_or_nothing(fused: bool) -> None:
    sizes = [30_000, 50_000, 20_000]
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = torch.optim.AdamW(parameters, fused=fused)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # creates the moments
    known = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    known += [t for state in optimizer.state.values() for t in state.values()]
    with LiveMemory(known) as live, torch.no_grad():
        optimizer.step()
    assert live.peak == pytest.approx(0 if fused else step_bytes(sizes), rel=0.01, abs=100)


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_quantized_layers_have_the_planned_size(bits: Any) -> None:
    network = nn.Sequential(nn.ModuleList([nn.Linear(128, 640)]))
    layer: Any = network[0][0]  # type: ignore[index]
    planned = quantized_bytes(layer.to(torch.bfloat16), bits)
    quantize(network, bits)
    small: Any = network[0][0]  # type: ignore[index]
    if bits == "int8":
        held = [small.weight, small.bias, torch.empty(640)]  # the scales are made at the first call
    else:
        state = small.weight.quant_state
        assert state.nested
        held = [
            small.weight,
            small.bias,
            state.absmax,
            state.code,
            state.offset,
            state.state2.absmax,
            state.state2.code,
        ]
    assert planned == sum(tensor.nbytes for tensor in held)


# --- what happens in a step -------------------------------------------------------------------------------------------


def test_the_rollouts_graph_is_alive_while_teacher_and_fake_are_evaluated() -> None:
    found = snapshots(stand_in_trainer(config(accumulate=2)))
    student = Evaluated("student", 1, "parameters")
    guided = [s for s in found if s.update == "student" and s.evaluation == Evaluated("teacher", 2, "none")]
    assert guided
    assert all(s.alive == (student,) for s in guided), "two micro-batches at once, because the teacher is guided"
    critic = [s for s in found if s.update == "fake" and s.evaluation.graph == "parameters"]
    assert {(s.evaluation.role, s.alive) for s in critic} == {("fake", ())}
    assert any("fake" in s.gradients for s in critic), "the second micro-batch adds to the first one's gradients"


def test_frames_one_after_the_other_keep_what_each_is_given_of_those_before() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with META:
        denoiser = Denoiser(
            VideoUNet(widths=(8, 16), blocks=(1, 1), embedding=8, heads=2, causal=True), RectifiedFlow()
        )
    to_fake([denoiser], mode)
    labels = {"labels": ((), torch.int64)}
    costs = partial(evaluation_memory, denoiser, (1, 4, 8, 8), labels, 2, with_gradients=True, mode=mode)
    with mode:
        condition = Condition({"labels": torch.empty(2, dtype=torch.int64)})
        frame, pasts = torch.empty(2, 1, 1, 8, 8), list[Past]()
        for _ in range(4):
            _, past = denoiser.after(pasts[-1] if pasts else None, frame, 0.5, condition)
            pasts.append(past)
    known = sum(tensor.nbytes for past in pasts for tensor in past)
    whole = costs("none")
    by_frame = costs("none", by_frame=True)
    assert by_frame.kept == whole.kept + known
    assert costs("parameters", by_frame=True).kept > costs("parameters").kept + known
    found = snapshots(stand_in_trainer(load_benchmark().causal_config()))
    graph = Evaluated("student", 1, "parameters", by_frame=True)
    assert any(graph in snapshot.alive for snapshot in found if snapshot.evaluation.role == "teacher")
    assert not any(snapshot.alive for snapshot in found if snapshot.evaluation.by_frame), "all frames count together"


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_of_copies_in_closed_form() -> None:
    plan = plan_memory(config(), costs=free)
    assert plan.roles["teacher"].weights == FASHION
    assert vars(plan.roles["student"]) == {
        "weights": FASHION, "gradients": FASHION, "moments": 2 * FASHION, "average": FASHION,
    }  # fmt: skip
    assert vars(plan.roles["fake"]) == {"weights": FASHION, "gradients": FASHION, "moments": 2 * FASHION, "average": 0}
    assert plan.resident == 8 * FASHION
    # a student's average in use holds two sets of its weights; only the role updated last holds gradients
    assert plan.peaks["samples of the averaged student"] == 2 * FASHION
    assert plan.total == 10 * FASHION
    assert plan.as_dict()["total"] == plan.total


def test_an_evaluation_is_added_to_the_graphs_alive_and_the_gradients_held() -> None:
    """Each evaluation keeps 1 MiB per micro-batch from forward to backward pass and needs 5 at its peak."""

    def cost(settings: Config, stage: object, evaluation: Evaluated, with_gradients: bool) -> EvaluationMemory:
        return EvaluationMemory(evaluation.batches * 2**20, 5 * evaluation.batches * 2**20)

    peaks = plan_memory(config(accumulate=2), costs=cost).peaks
    # the second micro-batch of an update meets the gradients of the first, those of the update before are freed
    assert peaks["teacher evaluated in the update student"] == FASHION + (1 + 10) * 2**20
    assert peaks["fake evaluated in the update fake"] == FASHION + 5 * 2**20


def test_settings_change_what_they_should() -> None:
    def planned(**changes: Any) -> Any:
        return plan_memory(config(**changes), costs=free)

    plain, gpu = planned(), planned(device="cuda")
    assert plain.peaks["optimizer step of fake"] < 1.3 * FASHION
    assert gpu.peaks["optimizer step of fake"] == FASHION, "a fused step needs its gradients alone"
    assert planned(offload=True).resident == plain.resident - FASHION
    shared = plan_memory(config(accumulate=2), devices=2, costs=free)
    assert shared.peaks["mean over devices in the update student"] == 2 * FASHION
    with pytest.raises(UserError, match=r"must be a multiple of the 2 devices.*accumulate=4\."):
        plan_memory(config(accumulate=3), 2, costs=free)
    assert "samples of the averaged student" not in planned(health={"every": 0}).peaks


def test_split_networks_in_closed_form() -> None:
    """Of a network of two layers each of two devices holds half of every tensor. In an evaluation of the student for
    its gradients a layer is held three times (as it arrives, as it is used, the next as it arrives), and its gradient
    twice; the second layer is the last to be evaluated."""
    network = Denoiser(TwoLayers(), RectifiedFlow())
    layer, bytes_held = 8 * 32 * 4, 2 * 8 * 32 * 4 // 2
    shards = Shards.of({"student": make_role(network, RoleConfig(lr=1e-5)), "teacher": Role(network)}, 2)
    assert shards.nbytes(network.parameters()) == bytes_held
    assert shards.gathered("teacher", "none") == shards.gathered("teacher", "input") == 3 * layer
    assert shards.gathered("student", "parameters") == (3 + 2) * layer
    assert Shards().nbytes(network.parameters()) == 2 * layer
    uneven = nn.Parameter(torch.ones(5, 3))
    assert Shards(4, frozenset({id(uneven)})).elements(uneven) == 2 * 3, "of 5 rows the first of 4 devices holds 2"


def test_shard_saves_weights_gradients_moments_and_averages() -> None:
    whole, split = (plan_memory(config(accumulate=2, shard=shard), 2, costs=free) for shard in (False, True))
    assert split.resident == pytest.approx(whole.resident / 2, rel=0.02)
    assert split.roles["student"].gradients == pytest.approx(FASHION / 2, rel=0.02)
    assert "mean over devices in the update student" not in split.peaks, "reduced layer by layer"
    assert plan_memory(config(shard=True), 1, costs=free) == plan_memory(config(), 1, costs=free)


def test_adapters_on_a_split_base_stay_whole() -> None:
    pytest.importorskip("peft")
    one, two = (
        plan_memory(config(adapters={"rank": 4}, accumulate=2, shard=True), devices, costs=free) for devices in (1, 2)
    )
    assert two.roles["teacher"].weights == pytest.approx(one.roles["teacher"].weights / 2, rel=0.02)
    assert two.roles["student"] == one.roles["student"]
    assert "mean over devices in the update student" in two.peaks


def test_adapters_share_one_base() -> None:
    pytest.importorskip("peft")
    plan = plan_memory(config(adapters={"rank": 4}), costs=free)
    assert plan.roles["teacher"].weights == FASHION
    student = plan.roles["student"]
    assert 0 < student.weights < 0.2 * FASHION
    assert (student.gradients, student.moments) == (student.weights, 2 * student.weights)


def test_a_plan_is_near_the_peak_of_training() -> None:
    benchmark = load_benchmark()
    assert 0.85 < benchmark.compare("bundled", "copies", config(batch=4, health={"every": 2}))["ratio"] < 1.15


def test_the_plan_of_a_causal_rollout_is_near_its_peak() -> None:
    """A frame keeps what is known of those before it until the update is over."""
    benchmark = load_benchmark()
    assert 0.95 < benchmark.compare("clips", "causal rollout", benchmark.causal_config())["ratio"] < 1.05


def test_recordings_keep_what_they_need_of_each_evaluation() -> None:
    """The student's and the fake's with a graph alone, one memory for those without: of the teacher, guided, and of the
    rollout."""
    needs = {"none": 3, "parameters": 40, "input": 0}

    def cost(settings: Config, stage: object, evaluation: Evaluated, with_gradients: bool) -> EvaluationMemory:
        size = evaluation.batches * needs[evaluation.graph] * 2**20
        return EvaluationMemory(0, size + (0 if with_gradients else 2**20))

    plain, recorded = (plan_memory(config(cuda_graphs=on, device="cuda"), costs=cost) for on in (False, True))
    assert recorded.peaks == plain.peaks
    assert recorded.resident - plain.resident == (2 * 3 + 2 * (40 + 1)) * 2**20


def load_benchmark() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks/memory_plan.py"
    spec = importlib.util.spec_from_file_location("memory_plan", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_committed_comparisons_are_within_15_percent() -> None:
    records = json.loads((Path(__file__).parents[2] / "results/memory_plan.json").read_text())
    assert len(records) >= 20
    assert all(0.85 < record["ratio"] < 1.15 for record in records)


def test_a_config_without_a_network_is_refused() -> None:
    with pytest.raises(UserError, match="neither teacher"):
        plan_memory(config(teacher=None))


@pytest.mark.filterwarnings("error")
def test_a_later_stage_is_planned_without_a_warning() -> None:
    """Its roles are copies of the first stage's, of which a plan makes fake tensors."""
    first = config().model_dump(mode="json")["stages"][0]
    later = {**first, "roles": {"student": {"lr": 1e-5, "init": "student"}, "fake": {"lr": 1e-5, "init": "keep"}}}
    two = config(stages=[first, later])
    assert plan_memory(two).total >= plan_memory(config()).total
