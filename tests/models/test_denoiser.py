"""The denoiser: times of every shape, features of layers, and experts by noise level."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, Routed, expand_like
from fewstep.models.schedules import RectifiedFlow


class Timed(nn.Module):
    """``raw = t x_t``, which shows the time that each value received."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert t.dtype == torch.float64
        return expand_like(t, x_t).to(x_t) * x_t


class Layers(nn.Module):
    """Two tanh layers [B, 3] -> [B, 3], the first with gradient checkpointing if ``recompute``."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.second = nn.Linear(3, 3)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        hidden = checkpoint(self.first, x_t, use_reentrant=False) if self.recompute else self.first(x_t)
        return self.second(hidden)


class Constant(nn.Module):
    """An expert that returns its number plus the label of each sample."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t) + self.number + condition["labels"][:, None]


# ---- times


@pytest.mark.parametrize(
    "t",
    [
        0.25,
        torch.tensor(0.25),
        torch.tensor([0.25, 0.25]),
        torch.full((2, 1, 1), 0.25),
        torch.full((1, 3, 1), 0.25),
        torch.full((2, 3, 4), 0.25),
    ],
    ids=["number", "0-d", "[B]", "[B, 1, 1]", "[1, F, 1]", "full"],
)
def test_times_may_have_any_shape_that_broadcasts(t: Tensor | float) -> None:
    x_t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    prediction = Denoiser(Timed(), RectifiedFlow())(x_t, t, Condition())
    assert_close(prediction.raw, 0.25 * x_t)
    assert_close(prediction.x0, x_t - 0.25 * prediction.raw)


@pytest.mark.parametrize(
    "t", [torch.tensor([0.1, 0.9]), torch.tensor([[[0.0], [0.2], [1.0]]])], ids=["[B]", "[1, F, 1]"]
)
def test_samples_and_frames_may_have_different_noise_levels(t: Tensor) -> None:
    x_t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    level = t[:, None, None] if t.ndim == 1 else t
    assert_close(Denoiser(Timed(), RectifiedFlow())(x_t, t, Condition()).x0, x_t - level**2 * x_t)


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 3), (3, 1, 1), (2, 2, 1)])
def test_times_that_do_not_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"fit neither the batch nor the shape \(2, 3, 4\)"):
        Denoiser(Timed(), RectifiedFlow())(torch.zeros(2, 3, 4), torch.zeros(shape), Condition())


# ---- the backbone's output


def test_a_backbone_that_changes_the_shape_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return x_t[:, :2]

    with pytest.raises(ValueError, match=r"returned \(4, 2\) for an input of \(4, 3\)"):
        Denoiser(Wrong(), RectifiedFlow())(torch.zeros(4, 3), 0.5, Condition())


@pytest.mark.parametrize(
    ("given", "raw"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_predictions_are_at_least_float32(given: torch.dtype, raw: torch.dtype) -> None:
    backbone = Layers().to(given)
    assert Denoiser(backbone, RectifiedFlow())(torch.ones(2, 3, dtype=given), 0.5, Condition()).x0.dtype == raw


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown prediction type 'epsilon'; known: x0, noise"):
        Denoiser(Timed(), RectifiedFlow(), "epsilon")  # type: ignore[arg-type]


# ---- feature layers


@pytest.mark.parametrize("copied", [False, True], ids=["original", "deep copy"])
def test_a_prediction_contains_the_features_of_its_own_evaluation(copied: bool) -> None:
    """A student that is a deep copy of the teacher has its own features."""
    teacher = Denoiser(Layers(), RectifiedFlow(), feature_layers=("first", "first.0"))
    denoiser = copy.deepcopy(teacher) if copied else teacher
    for x_t in torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)):
        features = denoiser(x_t, 0.5, Condition()).features
        assert set(features) == {"first", "first.0"}
        assert_close(features["first"], denoiser.backbone.first(x_t))


def test_without_feature_layers_there_are_no_features() -> None:
    assert Denoiser(Layers(), RectifiedFlow())(torch.zeros(2, 3), 0.5, Condition()).features == {}


def test_gradient_checkpointing_changes_neither_features_nor_gradients() -> None:
    """The backward pass runs the feature layer again; the prediction keeps its tensors."""
    plain = Denoiser(Layers(), RectifiedFlow(), feature_layers=("first", "first.0"))
    recomputing = copy.deepcopy(plain)
    recomputing.backbone.recompute = True
    x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for denoiser in (plain, recomputing):
        prediction = denoiser(x_t, 0.5, Condition())
        before = dict(prediction.features)
        (prediction.x0.square().sum() + prediction.features["first"].sum()).backward()
        assert prediction.features == before  # the same tensors, not equal ones
    for one, two in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert_close(one.grad, two.grad)


def test_a_missing_feature_layer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"feature layer 'third' does not exist"):
        Denoiser(Layers(), RectifiedFlow(), feature_layers=("third",))


@pytest.mark.parametrize("rest", ["prompt", "nothing", "residuals"])
def test_the_feature_is_the_last_tensor_of_several_outputs(rest: str) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[object, object]:
            return (x + 2, (x, x)) if rest == "residuals" else (x if rest == "prompt" else None, x + 2)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return next(out for out in reversed(self.pair(x_t)) if isinstance(out, Tensor))

    prediction = Denoiser(Backbone(), RectifiedFlow(), feature_layers=("pair",))(torch.zeros(1, 1), 0.5, Condition())
    assert (prediction.features["pair"].item(), prediction.raw.item()) == (2, 2)


# ---- experts by noise level


def three_experts() -> Routed:
    return Routed([Constant(100), Constant(200), Constant(300)], (0.875, 0.5, 0.0))


@pytest.mark.parametrize(("t", "expert"), [(1.0, 0), (0.875, 0), (0.8749, 1), (0.5, 1), (0.4999, 2), (0.0, 2)])
def test_a_boundary_belongs_to_the_noisier_expert(t: float, expert: int) -> None:
    assert three_experts().expert_of(torch.tensor([t], dtype=torch.float64)).tolist() == [expert]


def test_a_mixed_batch_equals_its_samples_alone() -> None:
    routed = Denoiser(three_experts(), RectifiedFlow())
    t = torch.tensor([0.1, 0.9, 0.6, 0.95, 0.3])
    condition = Condition.of_labels(torch.arange(5), 10)
    x_t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    together = routed(x_t, t, condition).raw
    assert together[:, 0].tolist() == [300, 101, 202, 103, 304]
    for i in range(5):
        row = slice(i, i + 1)
        assert_close(routed(x_t[row], t[row], condition.index(row)).raw, together[row])


def test_experts_without_samples_are_not_evaluated() -> None:
    calls: list[int] = []
    routed = three_experts()
    for k, expert in enumerate(routed.experts):
        expert.register_forward_hook(lambda *_, k=k: calls.append(k))
    routed(torch.zeros(2, 1), torch.tensor([0.6, 0.7]), Condition.of_labels(torch.zeros(2), 10))
    assert calls == [1]


@pytest.mark.parametrize(("experts", "boundaries"), [(0, ()), (2, (0.0,)), (2, (0.0, 0.5)), (2, (0.9, 0.5))])
def test_boundaries_must_decrease_to_zero(experts: int, boundaries: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="boundaries must decrease and end at 0"):
        Routed([Constant(k) for k in range(experts)], boundaries)


def test_frames_with_different_noise_levels_have_no_single_expert() -> None:
    with pytest.raises(ValueError, match=r"one time per sample, got times of shape \(2, 3, 1\)"):
        three_experts()(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), Condition())
