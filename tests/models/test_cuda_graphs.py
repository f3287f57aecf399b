"""Recorded evaluations. Without a GPU a recording computes again, in place, what it recorded."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CASES, settings
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.trainer import Trainer
from fewstep.models import cuda_graphs
from fewstep.models.condition import Condition
from fewstep.models.cuda_graphs import EAGER, MOST, GraphedDenoiser
from fewstep.models.denoiser import Denoiser, routed
from fewstep.models.schedules import RectifiedFlow

STEPS = 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Network(nn.Module):
    """Two layers, and one that neither the input nor a weight reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x) + t.to(x)[:, None] + self.shift(condition["shift"])))
        return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Without a GPU, replaces recordings by what computes again; has one entry for each replay."""
    replays: list[bool] = []
    record = cuda_graphs.record if torch.cuda.is_available() else compute_again

    def counted(work: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
        replay, result = record(work, pool)

        def again() -> None:
            replays.append(True)
            replay()

        return again, result

    monkeypatch.setattr(cuda_graphs, "record", counted)
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_graphs, "warm_up", twice)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr("fewstep.distill.stage_checks.require_gpu", lambda config, device: None)
    return replays


def compute_again(work: Callable[[], Sequence[Tensor | None]], pool: Any = None) -> tuple[Callable[[], None], Any]:
    graph = torch.is_grad_enabled()
    result = work()

    def replay() -> None:
        with torch.set_grad_enabled(graph):
            new = work()
        for old, other in zip(result, new, strict=True):
            if old is not None:
                assert other is not None
                old.detach().copy_(other.detach())

    return replay, result


def twice(work: Callable[[], object]) -> None:
    work()
    work()


def pair(device: str) -> tuple[Denoiser, GraphedDenoiser]:
    torch.manual_seed(0)
    denoiser = Denoiser(Network(), RectifiedFlow(), feature_layers=["first", "shift"]).to(device)
    return denoiser, GraphedDenoiser(denoiser)


def given(seed: int, device: str, batch: int = 4) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    x, shift = torch.randn(2, batch, 3, generator=generator).to(device)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64), Condition({"shift": shift})


def gradients(
    denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Condition], use: Callable[[Any], Tensor]
) -> list[Tensor | None]:
    """Gradients of a loss of x0 and features to the input and to the weights."""
    x = inputs[0].clone().requires_grad_()
    denoiser.zero_grad()
    use(denoiser(x, *inputs[1:])).backward()
    return [x.grad, *(weight.grad for weight in denoiser.backbone.parameters())]


USES: dict[str, Callable[[Any], Tensor]] = {
    "x0": lambda prediction: prediction.x0.square().sum(),
    "features": lambda prediction: prediction.features["first"].cos().sum(),
    "both": lambda prediction: (prediction.x0 * prediction.features["first"]).sum(),
}


@pytest.mark.parametrize("device", DEVICES)
def test_replays_equal_evaluations(device: str, recorded: list[bool]) -> None:
    plain, graphed = pair(device)
    for seed in range(6):
        with torch.no_grad():
            for weight in plain.backbone.parameters():  # as an optimizer changes them
                weight.mul_(1.01)
            inputs = given(seed, device)
            ours, theirs = graphed(*inputs), plain(*inputs)
        torch.testing.assert_close(ours.x0, theirs.x0)
        torch.testing.assert_close(ours.features, theirs.features)
        assert len(recorded) == max(0, seed + 1 - EAGER)
    first = ours.raw.clone()
    with torch.no_grad():
        graphed(*given(9, device))
    assert torch.equal(ours.raw, first), "a later replay changes no earlier result"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_replays_equal_those_of_evaluations(device: str, use: str, recorded: list[bool]) -> None:
    plain, graphed = pair(device)
    for seed in range(6):
        inputs = given(seed, device)
        theirs = [None if g is None else g.clone() for g in gradients(plain, inputs, USES[use])]
        for ours, their in zip(gradients(graphed, inputs, USES[use]), theirs, strict=True):
            if their is None or not their.any():  # a replay's unused outputs pass zeros on
                assert ours is None or not ours.any()
            else:
                torch.testing.assert_close(ours, their)
    assert len(recorded) == 2 * (6 - EAGER)


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_network_passes_gradients_to_its_input_alone(device: str, recorded: list[bool]) -> None:
    plain, graphed = pair(device)
    plain.requires_grad_(False)
    found = []
    for seed in range(5):
        x, t, condition = given(seed, device)
        x.requires_grad_()
        losses = [USES["both"](each(x, t, condition)) for each in (graphed, plain)]
        found.append([torch.autograd.grad(loss, x)[0] for loss in losses])
    assert recorded
    for ours, theirs in found:  # later replays change no earlier gradient
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_several_replays_add_up(device: str, recorded: list[bool]) -> None:
    plain, graphed = pair(device)
    for each in range(6):
        sums = []
        for denoiser in (plain, graphed):
            denoiser.zero_grad()
            for seed in (each, each + 10, each + 20):
                denoiser(*given(seed, device)).x0.square().sum().backward()
            sums.append([weight.grad.clone() for weight in denoiser.backbone.parameters() if weight.grad is not None])
        torch.testing.assert_close(sums[1], sums[0])
    assert recorded


@pytest.mark.parametrize("device", DEVICES)
def test_two_evaluations_before_a_backward_pass_do_not_mix(device: str, recorded: list[bool]) -> None:
    plain, graphed = pair(device)
    for seed in range(6):
        found = []
        for denoiser in (plain, graphed):
            denoiser.zero_grad()
            one, two = denoiser(*given(seed, device)), denoiser(*given(seed + 10, device))
            (one.x0 * two.x0).sum().backward()
            found.append([weight.grad.clone() for weight in denoiser.backbone.parameters() if weight.grad is not None])
        torch.testing.assert_close(found[1], found[0])
    before = len(recorded)
    graphed(*given(0, device))  # given up: its graph is freed
    graphed(*given(1, device))
    assert len(recorded) == before + 2


@pytest.mark.gpu
def test_an_earlier_recording_that_is_garbage_does_no_harm(recorded: list[bool]) -> None:
    threshold = gc.get_threshold()
    try:
        for _ in range(3):
            graphed = pair("cuda")[1]
            for seed in range(2 * EAGER):
                gc.set_threshold(1 if seed == EAGER else 0)  # when it records, at every allocation
                gradients(graphed, given(seed, "cuda"), USES["both"])
            graphed.itself = [graphed]  # a cycle
    finally:
        gc.set_threshold(*threshold)
    assert recorded


def test_rare_shapes_are_not_recorded_nor_are_too_many(recorded: list[bool]) -> None:
    _, graphed = pair("cpu")
    with torch.no_grad():
        for batch in range(1, 50):
            graphed(*given(0, "cpu", batch))
        assert not recorded
        for batch in range(1, 50):
            for _ in range(EAGER):
                graphed(*given(0, "cpu", batch))
        assert len(graphed._recordings) == MOST


def test_a_network_that_cannot_be_recorded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: object, pool: object = None) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "warm_up", fails)
    _, graphed = pair("cpu")
    with torch.no_grad():
        for _ in range(EAGER):
            graphed(*given(0, "cpu"))
        with pytest.raises(UserError, match=r"a Network cannot be .* capturing\. Set cuda_graphs: false"):
            graphed(*given(0, "cpu"))


def test_experts_by_noise_level_are_refused() -> None:
    plain, _ = pair("cpu")
    with pytest.raises(UserError, match="several experts by noise level"):
        GraphedDenoiser(routed([plain, pair("cpu")[0]], [0.5, 0.0]))


# --- in training ------------------------------------------------------------------------------------------------------


def losses(raw: dict[str, Any], device: str) -> Iterator[dict[str, float]]:
    config = parse_config(raw, "test")
    trainer = Trainer(config, build_inputs(config, torch.device(device)), torch.device(device))
    for _ in range(STEPS):
        metrics = trainer.one_step().items()
        yield {name: value.item() for name, value in metrics if name.startswith(("loss/", "grad_norm/"))}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("objective", "changes"), CASES)
def test_training_is_the_same(
    objective: str, changes: dict[str, Any], device: str, precision: str, tmp_path: Path, recorded: list[bool]
) -> None:
    raw = settings(objective, tmp_path, device, precision, **changes) | {"accumulate": 2}
    raw["stages"] = [{**raw["stages"][0], "steps": 2 * STEPS}]
    plain = list(losses(raw, device))
    assert not recorded
    rounding = 1e-6 if device == "cpu" else 1e-3 if precision == "float32" else 5e-2
    for ours, theirs in zip(losses(raw | {"cuda_graphs": True}, device), plain, strict=True):
        assert ours == pytest.approx(theirs, rel=rounding, abs=rounding / 10)
    assert recorded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "adapters"), [("sd", False), ("sdxl", False), ("sd3", True), ("flux", True), ("wan", True)]
)
def test_training_of_pipelines_is_the_same(
    name: str, adapters: bool, device: str, tmp_path: Path, recorded: list[bool]
) -> None:
    pytest.importorskip("peft")
    import tiny_pipelines

    tiny_pipelines.TINY[name].build().save_pretrained(tmp_path / "teacher")
    tiny_pipelines.write_embeddings(name, tmp_path / "teacher")
    lora = tiny_pipelines.ADAPTERS if adapters else None
    raw = tiny_pipelines.settings(tmp_path / "teacher", name, tmp_path / "run", lora)
    raw["stages"] = [{**raw["stages"][0], "steps": 2 * STEPS}]
    plain = list(losses(raw, device))
    for ours, theirs in zip(losses(raw | {"cuda_graphs": True}, device), plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6 if device == "cpu" else 1e-2, abs=1e-4)
    assert recorded


@pytest.mark.parametrize("device", DEVICES)
def test_a_lost_update_is_traced_to_its_layer(device: str, tmp_path: Path, recorded: list[bool]) -> None:
    raw = settings("dmd2", tmp_path, device, "float32", critic_updates=1) | {"cuda_graphs": True, "log_every": 1}
    raw["stages"] = [{**raw["stages"][0], "steps": 2 * STEPS}]
    config = parse_config(raw, "test")
    trainer = Trainer(config, build_inputs(config, torch.device(device)), torch.device(device))
    trainer.advance(STEPS)
    assert recorded
    next(trainer.roles["teacher"].module.parameters()).data.fill_(float("nan"))
    trainer.one_step()
    (lost,) = trainer.loop.lost
    assert re.search("the output of .* in the teacher is not finite for sample 0: its weight", str(lost))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they are recorded")
def test_without_a_gpu_they_are_refused(tmp_path: Path) -> None:
    raw = settings("dmd2", tmp_path, "cpu", "float32") | {"cuda_graphs": True}
    config = parse_config(raw, "test")
    with pytest.raises(UserError, match="cuda_graphs: true needs a GPU, and this run is on cpu"):
        Trainer(config, build_inputs(config, torch.device("cpu")), torch.device("cpu"))


@pytest.mark.parametrize("change", [{"offload": True}, {"shard": True}, {"gradient_checkpointing": True}])
def test_what_saves_memory_excludes_them(change: dict[str, Any], tmp_path: Path) -> None:
    raw = settings("dmd2", tmp_path, "cpu", "float32") | {"cuda_graphs": True}
    with pytest.raises(UserError, match="cuda_graphs keeps memory to save time"):
        parse_config(raw | change, "test")
