"""Flow matching: its loss in closed form, its type, and the share of dropped conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, VP, build_objective, trained

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.objectives.flow_matching import FlowMatching
from fewstep.distill.roles import Roles
from fewstep.distill.update import LossTerm, MicroBatch, Objective
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.prediction import Kind
from fewstep.models.schedules import NoiseSchedule

N = 20_000


class Constant(nn.Module):
    """Predicts one number everywhere, and records the labels and times that it receives."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.labels, self.times = condition.get("labels"), t
        return self.value.expand(x_t.shape)


def source(random: KeyedRandom, size: int) -> Batch:
    """Images that are 2 everywhere, of class 3 of 10."""
    labels = torch.full((size,), 3)
    return Batch(size, (2,), Condition.of_labels(labels, 10), {"x0": torch.full((size, 2), 2.0)})


def step(value: float, schedule: NoiseSchedule, kind: Kind, **settings: object) -> tuple[Tensor, Constant]:
    """The loss of one step, and the network."""
    network = Constant(value)
    roles = Roles({"student": trained(Denoiser(network, schedule, kind))})
    (update,) = build_objective("flow_matching", roles, **settings).updates
    losses: list[Tensor] = []

    def terms(micro: MicroBatch) -> Iterator[LossTerm]:
        for term in update.terms(micro):
            losses.append(term.loss.detach())
            yield term

    Loop(roles, Objective((replace(update, terms=terms),)), {"data": source}, batch=N).step(0)
    return losses[0], network


@pytest.mark.parametrize(
    ("schedule", "kind", "expected"),
    [
        (FLOW, "velocity", 1 + (0.5 + 2) ** 2),  # noise - x0
        (FLOW, "noise", 1 + 0.5**2),
        (FLOW, "x0", (0.5 - 2) ** 2),
        (VP, "noise", 1 + 0.5**2),
    ],
)
def test_the_loss_is_the_mean_square_distance_from_the_networks_own_kind(
    schedule: NoiseSchedule, kind: Kind, expected: float
) -> None:
    loss, _ = step(0.5, schedule, kind)
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert loss.dtype == torch.float32, "though times are float64"


def test_conditions_are_dropped_with_their_probability_and_independently_of_the_time() -> None:
    for probability in (0.0, 0.1, 1.0):
        _, network = step(0.5, FLOW, "velocity", drop_condition=probability)
        dropped = network.labels != 3
        assert dropped.double().mean().item() == pytest.approx(probability, abs=0.01)
        assert (network.labels[dropped] == 10).all(), "the null class"
        if probability == 0.1:
            assert network.times[dropped].mean().item() == pytest.approx(0.5, abs=0.03)


def test_each_frame_of_a_video_can_have_its_own_time() -> None:
    """Frames of 2 everywhere at time t are 2 (1 - t) + t noise: with times of the law in each frame of each sample."""

    class Recorder(Constant):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.x_t = x_t
            return super().forward(x_t, t, condition)

    def videos(random: KeyedRandom, size: int) -> Batch:
        x0 = torch.full((size, 1, 3, 8, 8), 2.0)
        return Batch(size, (1, 3, 8, 8), Condition({}, {}), {"x0": x0})

    network = Recorder(0.0)
    roles = Roles({"student": trained(Denoiser(network, FLOW, "velocity"))})
    objective = build_objective("flow_matching", roles, times_per_frame=True, drop_condition=0)
    Loop(roles, objective, {"data": videos}, batch=500).step(0)
    times = network.times
    assert times.shape == (500, 1, 3, 1, 1)
    assert (times[:, :, 1:] - times[:, :, :-1]).abs().mean() == pytest.approx(1 / 3, abs=0.03), (
        "independent and uniform"
    )
    t = times.float().flatten()
    expected = 2 * (1 - t)
    assert ((network.x_t.mean((1, 3, 4)).flatten() - expected) / t * 8).std() == pytest.approx(1, abs=0.05)


def test_times_per_frame_need_frames() -> None:
    settings = FlowMatching(name="flow_matching", times_per_frame=True)
    with pytest.raises(UserError, match="needs videos"):
        settings.networks(Denoiser(Constant(0.0), FLOW, "velocity"), (3, 32, 32), Condition({}, {}))
