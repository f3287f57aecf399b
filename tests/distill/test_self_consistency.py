"""Salt's self-consistency term: its times, its algebra, where its gradient goes, and runs with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_students import CLASSES, SHAPE, TIMES, TINY, micro_batch, network, student_roles
from torch import Tensor
from worlds import FLOW, VP

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.causal_rollouts import causal_rollout
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.batch import Batch
from fewstep.distill.explain import explain
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import backward_simulation
from fewstep.distill.self_consistency import SelfConsistency, choose_interval, self_consistency_loss
from fewstep.distill.update import LastStep, MicroBatch, StudentSample
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model
from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.grids import time_uniform

EIGHT = time_uniform(8)[:-1]
NO_CONDITION = Condition()


def sampled(x: Tensor, t_s: Tensor, velocity: Any, schedule: NoiseSchedule = FLOW, key: int = 0) -> MicroBatch:
    """A micro-batch whose sample a student with this velocity (x, t) predicted at ``x`` and ``t_s``."""

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        time = t[:, None].to(x)
        alpha, sigma, d_alpha, d_sigma = (
            of(time) for of in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma)
        )
        return (d_sigma * x - sigma * velocity(x, time)) / (alpha * d_sigma - sigma * d_alpha)

    x0 = evaluate(x, t_s).requires_grad_()
    sample = StudentSample(x0, torch.zeros_like(t_s), x0, t_s, NO_CONDITION, last=LastStep(x, evaluate))
    batch = Batch(len(x), tuple(x.shape[1:]), NO_CONDITION)
    roles = Roles({})
    micro = MicroBatch({"data": batch}, KeyedRandom(0, key, "x", 0), 0, roles)
    micro.shared["plain"] = micro.shared["graph"] = sample
    return micro


def test_every_interval_of_the_grid_is_chosen_equally_often() -> None:
    """For 8 training steps and 4 of sampling: t_e is one of two times of sampling below the successor of t_s."""
    for j, ends in ((0, {2, 4}), (1, {4, 6}), (2, {4, 6}), (4, {6, 8}), (5, {8}), (6, {8})):
        t_s = torch.full((4000,), EIGHT[j], dtype=torch.float64)
        t_m, t_e, valid = choose_interval(KeyedRandom(0, j, "x", 0), t_s, EIGHT, 2)
        assert valid.all()
        expected = {(m / 8, e / 8) for e in ends for m in range(j + 1, e)}
        found = Counter(zip((1 - t_m).tolist(), (1 - t_e).tolist(), strict=True))
        assert set(found) == expected
        for e in ends:
            each = [found[m / 8, e / 8] for m in range(j + 1, e)]
            assert sum(each) == pytest.approx(4000 / len(ends), rel=0.1)
            assert max(each) < 1.25 * min(each)
    last = torch.full((5,), EIGHT[7], dtype=torch.float64)
    assert not choose_interval(KeyedRandom(0, 0, "x", 0), last, EIGHT, 2).valid.any()


@pytest.mark.parametrize(("j", "ends"), [(4, (6, 8)), (6, (8,))])
def test_the_loss_of_a_linear_velocity_by_hand(j: int, ends: tuple[int, ...]) -> None:
    """u = a x: y_1 - y_2 = -a^2 (t_s - t_m) (t_m - t_e) x; with a = .8, .25 and .125: .02^2."""
    x, a = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64), 0.8
    t_s = torch.full((3,), EIGHT[j], dtype=torch.float64)
    for key in range(20):
        micro = sampled(x, t_s, lambda x, t: a * x, key=key)
        t_m, t_e, _ = choose_interval(KeyedRandom(*micro.random.key), t_s, EIGHT, 2)
        assert set((8 * (1 - t_e)).tolist()) <= set(ends)
        loss = self_consistency_loss(micro, FLOW, EIGHT, SelfConsistency(weight=0.2))
        expected = 0.2 * (1 - t_s) * (a**2 * (t_s - t_m) * (t_m - t_e) * x[:, 0]) ** 2
        torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-4, atol=1e-12)
    assert pytest.approx(0.0004) == (0.8**2 * 0.25 * 0.125) ** 2


@pytest.mark.parametrize("schedule", [FLOW, VP])
def test_steps_to_one_point_compose_in_every_schedule(schedule: NoiseSchedule) -> None:
    """Predictions of one x0 from every state lie on one line of x0 and noise."""
    x0 = torch.tensor([[0.3, -0.2]], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        noise = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
        return schedule.d_alpha(t) * x0 + schedule.d_sigma(t) * noise

    for j in (1, 4, 6):
        x, t_s = torch.randn(1, 2, dtype=torch.float64), torch.tensor([EIGHT[j]], dtype=torch.float64)
        micro = sampled(x, t_s, velocity, schedule)
        loss = self_consistency_loss(micro, schedule, EIGHT, SelfConsistency())
        (gradient,) = torch.autograd.grad(loss, micro.sample.output)
        assert loss < 1e-12
        assert gradient.abs().max() < 1e-6


def test_the_gradient_reaches_the_first_evaluation_alone() -> None:
    """d loss / d x0 = 2 weight (1 - t_s) (y_1 - y_2) / N times d y_1 / d x0 = alpha_e - sigma_e alpha_s / sigma_s."""
    x, t_s = torch.randn(6, 4, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
    micro = sampled(x, t_s, lambda x, t: 0.7 * x + t)
    t_m, t_e, _ = choose_interval(KeyedRandom(*micro.random.key), t_s, EIGHT, 2)
    loss = self_consistency_loss(micro, FLOW, EIGHT, SelfConsistency(weight=1.0))
    (gradient,) = torch.autograd.grad(loss, micro.sample.output)
    s, m, e = (t[:, None] for t in (t_s, t_m, t_e))
    first = 0.7 * x + s
    second = 0.7 * (x - (s - m) * first) + m
    difference = -(m - e) * (first - second)
    expected = 2 * (1 - s) * difference * ((1 - e) - e * (1 - s) / s) / x.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)


def test_the_last_training_step_and_pure_noise_have_no_term() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    for t in (1.0, EIGHT[-1]):
        micro = sampled(x, torch.full((2,), t, dtype=torch.float64), lambda x, t: 3 * x)
        assert self_consistency_loss(micro, FLOW, EIGHT, SelfConsistency()) == 0


@pytest.mark.parametrize("rollout", [backward_simulation, causal_rollout])
def test_a_rollouts_last_step_is_evaluated_again_as_it_was(rollout: Any) -> None:
    """For frames one by one: with the frames before them, from which no gradient flows."""
    roles = student_roles(network())
    micro = micro_batch(roles)
    with roles.updating(("student",)):
        sample = rollout(micro, roles, TIMES)
        x, evaluate = sample.last
        again = evaluate(x, sample.t_student)
        torch.testing.assert_close(again, sample.output, rtol=1e-6, atol=1e-6)
        other = evaluate(x + 0.1, 0.5 * sample.t_student)
    assert not x.requires_grad
    assert (other - sample.output).abs().max() > 1e-3
    assert sample.leaves(False).last is None
    assert sample.leaves(True).last is sample.last


@pytest.mark.parametrize("rollout", ["backward_simulation", "causal"])
def test_a_run_trains_on_the_fine_grid_and_samples_on_its_own(rollout: str, tmp_path: Path) -> None:
    backbone = {"name": "video_unet", "causal": True, **TINY}
    save_model(Denoiser(network(), FLOW), ModelConfig(backbone=backbone, shape=SHAPE, classes=CLASSES), tmp_path / "t")
    role = {"init": "teacher", "lr": 1.0e-3}
    settings = {
        "out": str(tmp_path / "run"), "teacher": str(tmp_path / "t"), "batch": 3, "health": {"every": 0},
        "stages": [{
            "steps": 2,
            "objective": {"name": "dmd2", "steps": 2, "rollout": rollout, "self_consistency": {"substeps": 3}},
            "roles": {"student": role, "fake": role},
        }],
    }  # fmt: skip
    config = parse_config(settings, "test")
    (stage,) = explain(config)
    student, fake = ({role: sum(n) for role, n in row.evaluations.items()} for row in stage.updates)
    assert student["teacher"] == 2
    assert student["student"] > fake["student"] + 1.5  # its own evaluation and the second one
    run = fewstep.train(config)
    lines = (run / "metrics.jsonl").read_text()
    assert '"loss/consistency"' in lines
    few = fewstep.load(run).config.few_step
    assert few is not None
    assert few.times == (1.0, 0.5)


def test_substeps_of_one_are_refused() -> None:
    settings = {"name": "dmd2", "self_consistency": {"substeps": 1}}
    with pytest.raises(UserError, match=r"self_consistency\.substeps"):
        parse_config({"teacher": "fashion", "out": "x", "stages": [{"steps": 1, "objective": settings}]}, "test")
