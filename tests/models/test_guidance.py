"""Guidance: ``null + w (cond - null)``, when and how it is applied, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, GuidanceStyle, expand_like
from fewstep.models.guidance import OFF, Guidance, guide
from fewstep.models.prediction import KINDS
from fewstep.models.schedules import RectifiedFlow

CLASSES = 10
LABELS = Condition.of_labels(torch.tensor([1, 2, 3]), CLASSES)
X_T = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Labelled(nn.Module):
    """``raw = (label + 1) (x_t + t)``, with a record of the conditions that it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Condition] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.asked.append(condition)
        return expand_like(condition["labels"] + 1, x_t) * (x_t + expand_like(t, x_t).to(x_t))

    @property
    def evaluations(self) -> int:
        return sum(condition["labels"].shape[0] for condition in self.asked)


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(Labelled(), RectifiedFlow())


def test_off_is_one_evaluation_of_the_condition_alone(denoiser: Denoiser) -> None:
    read = guide(denoiser, X_T, 0.5, LABELS, OFF)
    assert read.out is read.cond
    assert denoiser.backbone.evaluations == 3
    with pytest.raises(ValueError, match="not guided, so it has no unconditional part"):
        _ = read.unconditional


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 2.0, 7.5])
def test_a_guided_read_is_the_null_plus_w_times_the_difference(denoiser: Denoiser, w: float) -> None:
    """w = 0 is unconditional, w < 0 pushes away; every view of the prediction obeys the one formula."""
    read = guide(denoiser, X_T, torch.tensor([0.2, 0.5, 0.9]), LABELS, Guidance(w))
    for kind in KINDS:
        cond, null, out = (part.view(kind) for part in (read.cond, read.unconditional, read.out))
        assert_close(out, null + w * (cond - null), rtol=1e-4, atol=1e-4)
    if w == 0:
        assert_close(read.out.raw, denoiser(X_T, torch.tensor([0.2, 0.5, 0.9]), LABELS.null()).raw)


def test_both_parts_come_from_one_call_of_twice_the_batch(denoiser: Denoiser) -> None:
    read = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0))
    (asked,) = denoiser.backbone.asked
    assert asked["labels"].tolist() == [1, 2, 3, CLASSES, CLASSES, CLASSES]
    assert_close(read.cond.raw, denoiser(X_T, 0.5, LABELS).raw)
    assert_close(read.unconditional.raw, denoiser(X_T, 0.5, LABELS.null()).raw)


def test_outside_the_interval_guidance_is_off(denoiser: Denoiser) -> None:
    """The ends belong to the interval; each sample is judged by its own time."""
    labels = Condition.of_labels(torch.arange(5), CLASSES)
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    x_t = torch.ones(5, 4)
    read = guide(denoiser, x_t, t, labels, Guidance(3.0, interval=(0.25, 0.75)))
    everywhere = guide(denoiser, x_t, t, labels, Guidance(3.0))
    inside = torch.tensor([False, True, True, True, False])[:, None]
    assert_close(read.out.raw, torch.where(inside, everywhere.out.raw, read.cond.raw))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_rescale_moves_the_spread_back_to_the_conditional_one(denoiser: Denoiser, strength: float) -> None:
    plain = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0)).out.raw
    read = guide(denoiser, X_T, 0.5, LABELS, Guidance(3.0, rescale=strength))
    wanted = (1 - strength) * plain.std(1) + strength * read.cond.raw.std(1)
    assert_close(read.out.raw.std(1), wanted)
    assert_close(read.out.raw / read.out.raw.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_embedded_guidance_is_told_to_the_network_which_is_read_once(denoiser: Denoiser, w: float) -> None:
    denoiser.style = GuidanceStyle(embedded=True)
    read = guide(denoiser, X_T, 0.5, LABELS, Guidance(w))
    (asked,) = denoiser.backbone.asked
    assert asked["guidance"].tolist() == [w] * 3
    assert (read.null, denoiser.backbone.evaluations) == (None, 3)
    assert "guidance" not in LABELS


@pytest.mark.parametrize(
    "t", [torch.tensor([[[0.1], [0.9]]]), torch.full((3, 2, 1), 0.5)], ids=["[1, F, 1]", "[B, F, 1]"]
)
def test_frames_at_different_levels_are_guided_too(denoiser: Denoiser, t: Tensor) -> None:
    x_t = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    read = guide(denoiser, x_t, t, LABELS, Guidance(2.0, interval=(0.5, 1.0)))
    cond, null = (denoiser(x_t, t, c).raw for c in (LABELS, LABELS.null()))
    assert_close(read.out.raw, torch.where(t >= 0.5, null + 2 * (cond - null), cond))


def test_the_parts_keep_their_own_features() -> None:
    class Tapped(Labelled):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.inner(super().forward(x_t, t, condition))

    read = guide(Denoiser(Tapped(), RectifiedFlow(), feature_layers=("inner",)), X_T, 0.5, LABELS, Guidance(2.0))
    for part in (read.cond, read.unconditional):
        assert_close(part.features["inner"], part.raw)
