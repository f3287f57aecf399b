"""Searched solver schedules, and gradients through samplers."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from worlds import MIXTURE, NOISE, VP, by_log_snr, mixture

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import RectifiedFlow
from fewstep.samplers import search
from fewstep.samplers.adjoint import ddim_step, midpoint_step, sampler_gradients
from fewstep.samplers.ddim import ddim
from fewstep.samplers.dpm_solver_pp import multistep_pp, singlestep_pp
from fewstep.samplers.exponential import Relaxation
from fewstep.samplers.multistep import Step
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.search import SolverSchedule, cross, evolve, mutate
from fewstep.samplers.unipc import unipc, unipc_steps

TIMES = tuple(by_log_snr(VP, 6))


def test_known_solvers_are_schedules_of_the_search_space() -> None:
    for steps, rule in (
        ([Step(1)] * 6, ddim),
        ([Step(min(2, 6 - i)) for i in range(6)], multistep_pp),
        (unipc_steps(6), unipc),
    ):
        torch.testing.assert_close(SolverSchedule(TIMES, tuple(steps))(mixture(), NOISE), rule(mixture(), NOISE, TIMES))


def test_mutations_and_crosses_are_valid_schedules() -> None:
    rng = random.Random(0)
    start = SolverSchedule(TIMES, tuple(unipc_steps(6)))
    other = start
    for _ in range(200):
        other = mutate(other, rng)
        assert other.times[0] == TIMES[0]
        assert other.times[-1] == TIMES[-1]
        assert all(a > b for a, b in zip(other.times[:-1], other.times[1:], strict=True))
        child = cross(start, other, rng)
        assert child.times in (start.times, other.times)
        assert all(step in (a, b) for step, a, b in zip(child.steps, start.steps, other.steps, strict=True))
        assert child(mixture(), NOISE[:4]).isfinite().all()


def test_mutations_change_each_decision_with_their_probability() -> None:
    """Of 4,000 steps: the order 1, 2 or 3 with weights 1:2:1, the others uniformly; the times by a factor."""
    times = tuple(k / 10 for k in range(9, -1, -1))
    start = SolverSchedule(times, tuple([Step(3, "noise", "bh1")] * 9))
    rng = random.Random(0)
    mutants = [mutate(start, rng, rate=0.5, spread=0.01) for _ in range(400)]
    steps = [step for mutant in mutants for step in mutant.steps]

    def share(where: list[bool]) -> float:
        return sum(where) / len(where)

    for order, expected in ((1, 0.125), (2, 0.25), (3, 0.625)):
        assert share([step.order == order for step in steps]) == pytest.approx(expected, abs=0.03)
    assert share([step.form == "data" for step in steps]) == pytest.approx(0.25, abs=0.03)
    for relaxation in get_args(Relaxation):
        expected = 0.625 if relaxation == "bh1" else 0.125
        assert share([step.relaxation == relaxation for step in steps]) == pytest.approx(expected, abs=0.03)
    assert share([step.correct for step in steps]) == pytest.approx(0.5, abs=0.03)
    factors = torch.tensor([[b / a for a, b in zip(times[1:-1], m.times[1:-1], strict=True)] for m in mutants])
    moved = factors[(factors - 1).abs() > 1e-12]
    assert len(moved) / factors.numel() == pytest.approx(0.5, abs=0.03)
    assert (moved.mean().item(), moved.std().item()) == pytest.approx((1.0, 0.01), abs=6e-4)
    assert mutate(start, rng, rate=0.0) == start
    default = [step for _ in range(400) for step in mutate(start, rng).steps]
    assert share([step.correct for step in default]) == pytest.approx(0.3, abs=0.03)


def test_by_default_times_change_by_eight_percent() -> None:
    start, rng = SolverSchedule((1.0, 0.5, 0.0), (Step(), Step())), random.Random(0)
    factors = torch.tensor([mutate(start, rng).times[1] / 0.5 for _ in range(20_000)])
    moved = factors[factors != 1]
    assert len(moved) / len(factors) == pytest.approx(0.3, abs=0.01)
    assert moved.mean().item() == pytest.approx(1.0, abs=3e-3)
    assert moved.std().item() == pytest.approx(0.08, abs=2e-3)


def test_mutated_times_that_meet_are_kept_apart_and_within_the_ends() -> None:
    start = SolverSchedule((1.0, 0.5, 0.4999, 0.4998, 0.001, 0.0), tuple([Step()] * 5))
    rng = random.Random(1)
    inner = [mutate(start, rng, rate=1.0, spread=2.0).times for _ in range(300)]
    assert all(a - b >= 1e-5 - 1e-12 for times in inner for a, b in pairwise(times))
    assert max(times[1] for times in inner) == pytest.approx(1 - 1e-4, abs=1e-12)
    assert all((times[0], times[-1]) == (1.0, 0.0) for times in inner)


def test_a_cross_takes_times_of_one_parent_and_steps_of_both() -> None:
    a = SolverSchedule(TIMES, tuple([Step(1)] * 6))
    b = SolverSchedule((*TIMES[:-1], TIMES[-1] / 2), tuple([Step(3)] * 6))
    rng = random.Random(0)
    children = [cross(a, b, rng) for _ in range(300)]
    with pytest.raises(ValueError, match="shorter"):
        cross(a, SolverSchedule(TIMES[:-1], tuple([Step(3)] * 5)), rng)
    assert sum(child.times == a.times for child in children) / 300 == pytest.approx(0.5, abs=0.1)
    assert sum(step.order == 1 for child in children for step in child.steps) / 1800 == pytest.approx(0.5, abs=0.05)


def test_evolution_scores_one_schedule_per_round_and_keeps_the_best_parents() -> None:
    """The score is the first inner time, so that the mutations that lower it survive."""
    start = [SolverSchedule(TIMES, tuple(unipc_steps(6))), SolverSchedule(TIMES, tuple([Step(1)] * 6))]
    scores: list[float] = []
    progress: list[tuple[int, int]] = []

    def score(schedule: SolverSchedule) -> float:
        scores.append(schedule.times[1])
        return scores[-1]

    found = evolve(start, score, rounds=60, parents=5, progress=lambda done, rounds: progress.append((done, rounds)))
    assert len(scores) == 62
    assert progress == [(k, 60) for k in range(1, 61)]
    assert [value for value, _ in found] == sorted(scores)[:5]
    assert all(value == schedule.times[1] for value, schedule in found)
    assert evolve(start, score, rounds=60, parents=5) == found, "the seed decides"
    assert evolve(start, score, rounds=60, parents=5, seed=1) != found
    assert len(evolve(start, score, rounds=60)) == 15
    worst_first = evolve(start, lambda s: math.nan if s == start[0] else 1.0, rounds=1)
    assert worst_first[0][0] == 1.0
    assert worst_first[-1] == (math.inf, start[0])


def test_three_of_ten_children_are_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    crossed: list[int] = []

    def counted(a: SolverSchedule, b: SolverSchedule, rng: random.Random) -> SolverSchedule:
        crossed.append(1)
        return cross(a, b, rng)

    monkeypatch.setattr(search, "cross", counted)
    evolve([SolverSchedule(TIMES, tuple(unipc_steps(6)))], lambda schedule: schedule.times[1], rounds=1000)
    assert len(crossed) / 1000 == pytest.approx(0.3, abs=0.05)


def test_evolution_finds_a_better_schedule_and_never_loses_the_best() -> None:
    truth = unipc(mixture(), NOISE, by_log_snr(VP, 300), order=3)

    def score(schedule: SolverSchedule) -> float:
        return (schedule(mixture(), NOISE) - truth).square().mean().item()

    start = SolverSchedule(TIMES, tuple(unipc_steps(6)))
    found = evolve([start, SolverSchedule(TIMES, tuple([Step(1)] * 6))], score, rounds=80)
    assert found == sorted(found, key=lambda pair: pair[0])
    assert found[0][0] < 0.5 * score(start)
    nan_loses = evolve([start], lambda s: score(s) if s == start else math.nan, rounds=5)
    assert nan_loses[0][1] == start


class TinyNetwork(nn.Module):
    """A small nonlinear model with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.tanh(self.b * x_t + self.a * t[:, None])


@pytest.mark.parametrize("rule", ["ddim", "midpoint"])
def test_the_discrete_adjoint_equals_the_gradient_of_the_unrolled_sampler(rule: str) -> None:
    model = TinyNetwork()
    predict = Predictor(Denoiser(model, VP, "x0"), Condition())
    times = (*by_log_snr(VP, 8), 0.0)
    unrolled, step = (ddim, ddim_step) if rule == "ddim" else (singlestep_pp, midpoint_step)

    def loss(x: Tensor) -> Tensor:
        return (x - 0.3).square().sum()

    x = NOISE[:5].clone().requires_grad_()
    value = loss(unrolled(predict, x, times))
    expected = torch.autograd.grad(value, [x, model.a, model.b])
    parameters = [model.a, model.b, model.unused]
    got = sampler_gradients(predict, NOISE[:5], times, loss, parameters, step(predict))
    assert got.parameters.pop().tolist() == [0, 0, 0], "a parameter without effect"
    torch.testing.assert_close(got.loss, value.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip([got.x, *got.parameters], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_on_gaussian_data_the_adjoint_converges_to_the_slope_of_the_exact_map() -> None:
    m, k, flow = 0.7, 0.5, RectifiedFlow()
    predict = Predictor(Denoiser(MixtureBackbone(GaussianMixture.single(m, k, 2), flow), flow, "x0"), Condition())
    times = by_log_snr(flow, 200, -3, 3)
    s, t = predict.nodes([times[0], times[-1]])
    exact = math.hypot(t.alpha * k, t.sigma) / math.hypot(s.alpha * k, s.sigma)
    got = sampler_gradients(predict, NOISE[:5], times, lambda x: x.sum(), step=midpoint_step(predict))
    assert got.x == pytest.approx(exact, rel=1e-3)


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """Only one step's graph exists at a time, so 40 steps save no more tensors for backward than 4."""

    def most_saved(steps: int) -> int:
        alive, most = 0, 0

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor, alive = tensor, alive + 1
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= 1

        predict = Predictor(Denoiser(MixtureBackbone(MIXTURE, VP), VP, "x0"), Condition())
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            sampler_gradients(predict, NOISE[:5], by_log_snr(VP, steps), lambda x: x.square().sum())
        return most

    assert most_saved(40) == most_saved(4)
