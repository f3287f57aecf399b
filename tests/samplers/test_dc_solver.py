"""DC-Solver: the shift in time, the search for ratios, and the polynomial fitted to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from worlds import FLOW, NOISE, VP, by_log_snr, mixture, tiny_teacher

from fewstep.api import solvers
from fewstep.core.errors import UserError
from fewstep.models.loading import load_model
from fewstep.models.weights_hash import weights_hash
from fewstep.samplers.dc_solver import (
    RatioPolynomial,
    dc_solver,
    golden_section,
    read_ratios,
    reference_states,
    search_ratios,
    shift_newest,
)
from fewstep.samplers.exponential import HistoryEntry
from fewstep.samplers.grids import grid
from fewstep.samplers.multistep import states
from fewstep.samplers.plan import SamplingConfig, plan
from fewstep.samplers.predictor import ModelOutput
from fewstep.samplers.unipc import unipc, unipc_steps


def test_a_shifted_output_is_the_polynomial_at_the_shifted_time() -> None:
    times = (0.5, 0.7, 0.8)
    nodes = [mixture().nodes([t])[0] for t in times]
    values = [torch.tensor([[2.0 - t + 3 * t * t]], dtype=torch.float64) for t in times]
    outputs = [ModelOutput(value, value, "x0", (1.0, 1.0, 0.0, 0.0)) for value in values]
    history = [HistoryEntry(node, output) for node, output in zip(nodes, outputs, strict=True)]
    for rho in (0.0, 0.6, 1.0, 1.7):
        t = rho * 0.5 + (1 - rho) * 0.7
        assert shift_newest(history, rho).output.x0.item() == pytest.approx(2 - t + 3 * t * t, abs=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_ratios_of_one_give_unipc(order: int) -> None:
    times = by_log_snr(VP, 8)
    got = dc_solver(mixture(), NOISE, times, [1.0] * 8, order=order)
    assert torch.equal(got, unipc(mixture(), NOISE, times, order=order))
    assert not torch.equal(got, dc_solver(mixture(), NOISE, times, [1.0] * 7 + [0.9], order=order))
    without_history = [0.5, 0.5, *[1.0] * 6]  # two outputs do not exist yet
    assert torch.equal(got, dc_solver(mixture(), NOISE, times, without_history, order=order))
    third = [1.0, 1.0, 0.5, *[1.0] * 5]
    assert not torch.equal(got, dc_solver(mixture(), NOISE, times, third, order=order))


def test_unipc_2_is_shifted_by_default() -> None:
    times, ratios = by_log_snr(VP, 5), [1.0, 1.0, 0.9, 1.1, 0.8]
    assert torch.equal(dc_solver(mixture(), NOISE, times, ratios), dc_solver(mixture(), NOISE, times, ratios, order=2))
    with pytest.raises(ValueError, match="5 steps need as many ratios, got 1"):
        dc_solver(mixture(), NOISE, times, [1.0])


def test_searched_ratios_reduce_the_error() -> None:
    times = grid(VP, 6, "time", end="minimum", t_min=0.02)
    references = reference_states(mixture(), NOISE, times, finer=40)
    ratios = search_ratios(mixture(), NOISE, times, references)
    assert ratios[:2] == [1.0, 1.0]
    assert any(ratio != 1 for ratio in ratios)
    plain, better = (dc_solver(mixture(), NOISE, times, r) for r in ([1.0] * 6, ratios))
    assert (better - references[-1]).square().mean() < (plain - references[-1]).square().mean()
    with pytest.raises(ValueError, match="need as many ratios"):
        dc_solver(mixture(), NOISE, times, [1.0])


def test_ratios_are_not_searched_towards_states_that_are_not_finite() -> None:
    times = by_log_snr(VP, 4)
    references = reference_states(mixture(), NOISE, times)
    references[2][5, 1] = float("nan")
    with pytest.raises(UserError, match="states of the long run are not finite"):
        search_ratios(mixture(), NOISE, times, references)


def test_reference_states_are_those_of_a_finer_run_at_the_same_times() -> None:
    times = grid(VP, 6, "time", end="minimum", t_min=0.02)
    fine = [t for a, b in pairwise(times) for t in torch.linspace(a, b, 41, dtype=torch.float64).tolist()[:-1]]
    path = list(states(mixture(), NOISE, [*fine, times[-1]], unipc_steps(240, 3)))
    references = reference_states(mixture(), NOISE, times, finer=40)
    assert len(references) == 6
    for got, expected in zip(references, path[39::40], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_ratios_are_used_with_the_grid_and_the_weights_that_they_were_searched_on(tmp_path: Path) -> None:
    teacher, other = (load_model(tiny_teacher(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 1)))
    assert teacher.path is not None
    file = teacher.path / "dc_solver.json"
    solvers.fit_dc(teacher.path, file, steps=[3], guidance=[2.0], n=2, grid="karras:0.02", device="cpu")
    assert {(each["grid"], each["model"]) for each in json.loads(file.read_text())} == {
        ("karras:0.02", weights_hash(teacher.denoiser))
    }
    plan(teacher, SamplingConfig("dc_solver_2", 3, 2.0, grid="karras:0.02"))
    with pytest.raises(UserError, match="do not fit the grid 'time'"):
        plan(teacher, SamplingConfig("dc_solver_2", 3, 2.0))
    with pytest.raises(UserError, match="no ratios near 3 steps at guidance 1"):
        plan(teacher, SamplingConfig("dc_solver_2", 3, grid="karras:0.02"))
    assert other.path is not None
    (other.path / "dc_solver.json").write_bytes(file.read_bytes())
    with pytest.raises(
        UserError, match=r"dc_solver\.json was fitted to other weights than this model's: run fewstep solver fit-dc"
    ):
        plan(other, SamplingConfig("dc_solver_2", 3, 2.0, grid="karras:0.02"))


def test_the_bundled_ratios_belong_to_the_bundled_model() -> None:
    model = load_model("fashion")
    request = plan(model, SamplingConfig("dc_solver_2", 5))
    assert model.path is not None
    ratios = read_ratios(model.path / "dc_solver.json", 5, 1.0)
    expected = dc_solver(mixture(FLOW), NOISE, request.times, ratios)
    assert torch.equal(request.solver(mixture(FLOW), NOISE, request.times, lambda: NOISE), expected)
    with pytest.raises(UserError, match=r"do not fit the grid 'karras:0\.02'"):
        plan(model, SamplingConfig("dc_solver_2", 5, grid="karras:0.02"))


def test_a_rule_of_order_one_also_shifts_by_three_outputs() -> None:
    times = by_log_snr(VP, 4)
    seen: list[int] = []

    def compensate(i: int, history: Sequence[HistoryEntry]) -> HistoryEntry:
        seen.append(len(history))
        return history[0]

    unipc(mixture(), NOISE, times, order=1, compensate=compensate)
    assert seen == [1, 2, 3, 3]


def test_golden_section_finds_the_minimum() -> None:
    assert golden_section(lambda r: (r - 0.73) ** 2, 0, 2, 30) == pytest.approx(0.73, abs=1e-4)


@pytest.mark.parametrize("minimum", [-0.9, 0.3, 1.4, 2.8])
@pytest.mark.parametrize("rounds", [2, 3, 12])
def test_golden_section_shrinks_the_interval_by_its_ratio_per_evaluation(minimum: float, rounds: int) -> None:
    at: list[float] = []

    def f(x: float) -> float:
        at.append(x)
        return abs(x - minimum)

    found = golden_section(f, -1.0, 3.0, rounds)
    assert len(at) == rounds
    assert found == min(at, key=lambda x: abs(x - minimum)), "the best of the evaluated"
    assert abs(found - minimum) <= 4 * 0.6181 ** (rounds - 1)
    assert all(-1 < x < 3 for x in at)


def test_the_features_are_products_of_powers() -> None:
    """fraction^i, i < 4; guidance / 12 and steps / 50, each squared, itself and 1."""
    features = RatioPolynomial.features(25, 3.0)
    assert features.shape == (25, 36)
    for k in (0, 7, 24):
        expected = [
            ((k + 1) / 25) ** i * w * n for i in range(4) for w in (1 / 16, 1 / 4, 1) for n in (1 / 4, 1 / 2, 1)
        ]
        assert features[k].tolist() == pytest.approx(expected)


def test_the_ratio_polynomial_is_recovered_from_its_values() -> None:
    truth = RatioPolynomial(torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0)).double().numpy())
    searched = {(n, w): truth.ratios(n, w) for n in (5, 8, 12, 20) for w in (1.0, 4.0, 7.5)}
    fitted = RatioPolynomial.fit(searched)
    for key, ratios in searched.items():
        assert fitted.ratios(*key) == pytest.approx(ratios, abs=1e-6)
    assert fitted.ratios(10, 3.0) == pytest.approx(truth.ratios(10, 3.0), abs=1e-5)


def test_ratios_are_read_or_interpolated_within_the_searched_range(tmp_path: Path) -> None:
    file = tmp_path / "dc_solver.json"
    entries = [{"steps": n, "guidance": 1.0, "order": 2, "ratios": [1.0, 1.0, *[0.9] * (n - 2)]} for n in (4, 6, 8)]
    file.write_text(json.dumps(entries))
    assert read_ratios(file, 6, 1.0) == entries[1]["ratios"]
    assert read_ratios(file, 5, 1.0) == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.9], abs=1e-3)
    all_of_it = "4 steps at 1, 6 steps at 1, 8 steps at 1"
    for steps, guidance, order, has in (
        (9, 1.0, 2, all_of_it), (3, 1.0, 2, all_of_it), (6, 2.0, 2, all_of_it), (6, 1.0, 3, "none")
    ):  # fmt: skip
        message = rf"has no ratios near {steps} steps at guidance {guidance:g} \(it has {has}\)"
        with pytest.raises(UserError, match=message):
            read_ratios(file, steps, guidance, order)
    more = [{**entry, "guidance": 3.0} for entry in entries]
    file.write_text(json.dumps(entries + more))
    for steps, guidance in ((4, 2.0), (8, 1.5), (5, 1.0), (5, 3.0)):  # the ends belong to the range
        assert read_ratios(file, steps, guidance) == pytest.approx([1.0, 1.0, *[0.9] * (steps - 2)], abs=1e-3)
    with pytest.raises(UserError, match=r"searched on the grid time and do not fit the grid 'karras:0\.02'"):
        read_ratios(file, 6, 1.0, grid="karras:0.02")
    file.write_text('[{"steps": 3, "guidance": 1.0, "order": 2, "ratios": [1.0, 1.0]}]')
    with pytest.raises(UserError, match=r"dc_solver\.json is not a readable .*3 steps need as many ratios, not 2"):
        read_ratios(file, 3, 1.0)
    file.write_text("[{}]")
    with pytest.raises(
        UserError, match=r"dc_solver\.json is not a readable file of ratios .*: run fewstep solver fit-dc"
    ):
        read_ratios(file, 6, 1.0)
