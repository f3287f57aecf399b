"""Guidance: ``null + w (cond - null)``, how it is applied, and how many evaluations it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, GuidanceStyle, expand_like
from fewstep.models.guidance import UNGUIDED, Guidance, guide
from fewstep.models.prediction import KINDS
from fewstep.models.schedules import RectifiedFlow

CLASSES = 10
LABELS = Condition.of_labels(torch.tensor([1, 2, 3]), CLASSES)
X_T = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Labelled(nn.Module):
    """``raw = (label + 1) (x_t + t)``; records the conditions that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Condition] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.received.append(condition)
        return expand_like(condition["labels"] + 1, x_t) * (x_t + expand_like(t, x_t).to(x_t))

    @property
    def evaluations(self) -> int:
        return sum(condition["labels"].shape[0] for condition in self.received)


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(Labelled(), RectifiedFlow())


def test_guidance_that_is_off_evaluates_the_condition_alone(denoiser: Denoiser) -> None:
    guided = guide(denoiser, X_T, 0.5, LABELS, UNGUIDED)
    assert guided.out is guided.cond
    assert denoiser.backbone.evaluations == 3
    with pytest.raises(ValueError, match="guidance was off, so there is no unconditional prediction"):
        _ = guided.unconditional


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 2.0, 7.5])
def test_the_guided_output_is_the_null_plus_w_times_the_difference(denoiser: Denoiser, w: float) -> None:
    """w = 0 is unconditional, w < 0 points away; the formula holds for every kind of prediction."""
    guided = guide(denoiser, X_T, torch.tensor([0.2, 0.5, 0.9]), LABELS, Guidance(w))
    for kind in KINDS:
        cond, null, out = (part.view(kind) for part in (guided.cond, guided.unconditional, guided.out))
        assert_close(out, null + w * (cond - null), rtol=1e-4, atol=1e-4)
    if w == 0:
        assert_close(guided.out.raw, denoiser(X_T, torch.tensor([0.2, 0.5, 0.9]), LABELS.null()).raw)


def test_both_branches_are_one_batch_of_twice_the_size(denoiser: Denoiser) -> None:
    guided = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0))
    (received,) = denoiser.backbone.received
    assert received["labels"].tolist() == [1, 2, 3, CLASSES, CLASSES, CLASSES]
    assert_close(guided.cond.raw, denoiser(X_T, 0.5, LABELS).raw)
    assert_close(guided.unconditional.raw, denoiser(X_T, 0.5, LABELS.null()).raw)


def test_a_graph_may_hold_the_conditional_branch_alone(denoiser: Denoiser) -> None:
    x_t = X_T.clone().requires_grad_()
    guided = guide(denoiser, x_t, 0.5, LABELS, Guidance(3.0), null_graph=False)
    assert [received["labels"].tolist() for received in denoiser.backbone.received] == [[1, 2, 3], [CLASSES] * 3]
    assert guided.cond.raw.requires_grad
    assert not guided.unconditional.raw.requires_grad
    together = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0))
    assert torch.equal(guided.out.raw, together.out.raw)


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_a_network_with_embedded_guidance_receives_the_scale_and_is_evaluated_once(
    denoiser: Denoiser, w: float
) -> None:
    denoiser.style = GuidanceStyle(embedded=True)
    guided = guide(denoiser, X_T, 0.5, LABELS, Guidance(w))
    (received,) = denoiser.backbone.received
    assert received["guidance"].tolist() == [w] * 3
    assert (guided.null, denoiser.backbone.evaluations) == (None, 3)
    assert "guidance" not in LABELS


def test_the_guidance_style_finishes_the_guided_output_only(denoiser: Denoiser) -> None:
    plain = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0))
    denoiser.style = GuidanceStyle(postprocess=lambda cond, out: 2 * out - cond)
    finished = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0))
    assert_close(finished.out.raw, 2 * plain.out.raw - plain.cond.raw)
    assert_close(finished.cond.raw, plain.cond.raw)
    assert_close(guide(denoiser, X_T, 0.5, LABELS, UNGUIDED).out.raw, plain.cond.raw)


@pytest.mark.parametrize(
    "t", [torch.tensor([[[0.1], [0.9]]]), torch.full((3, 2, 1), 0.5)], ids=["[1, F, 1]", "[B, F, 1]"]
)
def test_guidance_supports_frames_with_different_noise_levels(denoiser: Denoiser, t: Tensor) -> None:
    x_t = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    guided = guide(denoiser, x_t, t, LABELS, Guidance(2.0))
    cond, null = (denoiser(x_t, t, c).raw for c in (LABELS, LABELS.null()))
    assert_close(guided.out.raw, null + 2 * (cond - null))


def test_each_part_has_its_own_features() -> None:
    class Recorded(Labelled):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.inner(super().forward(x_t, t, condition))

    denoiser = Denoiser(Recorded(), RectifiedFlow(), feature_layers=("inner",))
    guided = guide(denoiser, X_T, 0.5, LABELS, Guidance(2.0))
    for part in (guided.cond, guided.unconditional):
        assert_close(part.features["inner"], part.raw)
