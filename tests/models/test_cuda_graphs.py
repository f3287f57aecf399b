"""Recorded evaluations; without a GPU by what stands in for it (``computed_again``)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models import cuda_graphs
from fewstep.models.condition import Condition
from fewstep.models.cuda_graphs import EAGER, MOST, GraphedDenoiser
from fewstep.models.denoiser import Denoiser, routed
from fewstep.models.schedules import RectifiedFlow

STEPS = 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Network(nn.Module):
    """Two layers, one that neither the input nor a weight reaches, two weights with one gradient, a float32 region."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()
        self.scale, self.gain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        h = torch.tanh(self.first(x) + t.to(x)[:, None] + self.shift(condition["shift"]))
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.second(h.float()) * (self.scale + self.gain)
        return out


def pair(device: str) -> tuple[Denoiser, GraphedDenoiser]:
    torch.manual_seed(0)
    denoiser = Denoiser(Network(), RectifiedFlow(), feature_layers=["first", "shift"]).to(device)
    return denoiser, GraphedDenoiser(denoiser)


def given(seed: int, device: str, batch: int = 4) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    x, shift = torch.randn(2, batch, 3, generator=generator).to(device)
    return x, torch.rand(batch, generator=generator, dtype=torch.float64), Condition({"shift": shift})


def gradients(
    denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Condition], use: Callable[[Any], Tensor], cast: bool = False
) -> list[Tensor | None]:
    """Gradients of a loss of x0 and features to the input and to the weights, each doubled in place."""
    x = inputs[0].clone().requires_grad_()
    denoiser.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=cast):
        prediction = denoiser(x, *inputs[1:])
    use(prediction).backward()
    found = [x.grad, *(weight.grad for weight in denoiser.backbone.parameters())]
    for gradient in found:
        if gradient is not None:
            gradient.mul_(2)
    return found


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
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_replays_equal_those_of_evaluations(
    device: str, cast: bool, use: str, recorded: list[bool]
) -> None:
    plain, graphed = pair(device)
    for seed in range(6):
        inputs = given(seed, device)
        theirs = gradients(plain, inputs, USES[use], cast)
        for ours, their in zip(gradients(graphed, inputs, USES[use], cast), theirs, strict=True):
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


def test_what_a_recording_cannot_do_is_refused(recorded: list[bool]) -> None:
    _, graphed = pair("cpu")
    x, t, condition = given(0, "cpu")
    x.requires_grad_()
    for _ in range(EAGER):
        graphed(x, t, condition)
    slope = graphed(x, t, condition).x0.sum()
    with pytest.raises(UserError, match=r"differentiable once .*create_graph"):
        torch.autograd.grad(slope, x, create_graph=True)
    del slope  # its backward pass is given up
    kept = graphed(x, t, condition).x0.sum()
    kept.backward(retain_graph=True)
    graphed(x, t, condition)
    with pytest.raises(UserError, match="retain_graph"):
        kept.backward()


def test_gradients_to_weights_are_not_overwritten(recorded: list[bool]) -> None:
    found = []
    for denoiser in pair("cpu"):
        for seed in range(4):
            weight = denoiser.backbone.second.weight
            one, two = [
                torch.autograd.grad(denoiser(*given(k, "cpu")).x0.square().sum(), weight)[0] for k in (seed, seed + 10)
            ]
        found.append((one.norm() / two.norm()).item())
    assert recorded
    assert found[0] == pytest.approx(found[1])


def test_a_frozen_network_without_a_graph_is_recorded(recorded: list[bool]) -> None:
    plain, graphed = pair("cpu")
    plain.requires_grad_(False)
    x, t, condition = given(0, "cpu")
    for _ in range(2 * EAGER):
        assert not graphed(x, t, condition).x0.requires_grad
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


def refuses(work: object, device: torch.device) -> None:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def refuses_and_ends(work: object, device: torch.device) -> None:
    try:
        refuses(work, device)
    finally:  # as ``torch.cuda.graph`` ends a recording
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("fails", [refuses, refuses_and_ends])
def test_a_network_that_cannot_be_recorded_is_named_with_the_cause(
    fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "warm_up", fails)
    _, graphed = pair("cpu")
    with torch.no_grad():
        for _ in range(EAGER):
            graphed(*given(0, "cpu"))
        with pytest.raises(UserError, match=r"a Network cannot be .* capturing\. Set cuda_graphs: false"):
            graphed(*given(0, "cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_may_use_the_null_values(device: str, recorded: list[bool]) -> None:
    """A network of one's own that guides itself."""

    class Guided(Network):
        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            without: Tensor = super().forward(x, t, condition.null())
            return 2 * super().forward(x, t, condition) - without

    plain = Denoiser(Guided(), RectifiedFlow()).to(device)
    graphed = GraphedDenoiser(plain)
    for seed in range(2 * EAGER):
        x, t, condition = given(seed, device)
        condition = Condition(condition.tensors, {"shift": torch.full((3,), float(seed), device=device)})
        with torch.no_grad():
            torch.testing.assert_close(graphed(x, t, condition).x0, plain(x, t, condition).x0)
    assert recorded


def test_experts_by_noise_level_are_refused() -> None:
    plain, _ = pair("cpu")
    with pytest.raises(UserError, match="several experts by noise level"):
        GraphedDenoiser(routed([plain, pair("cpu")[0]], [0.5, 0.0]))
