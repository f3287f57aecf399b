"""DPM-Solver-v3: exact with exact statistics, equal to ++ with trivial ones; the estimation of statistics."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from worlds import HIGH, LOW, NOISE, VP, by_log_snr, mixture, tiny_teacher

from fewstep.api import solvers
from fewstep.core.errors import UserError
from fewstep.core.files import read_metadata, read_tensors, write_tensors
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.loading import load_model
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow
from fewstep.samplers import dpm_solver_v3 as dpm_solver_v3_module
from fewstep.samplers.dpm_solver_pp import multistep_pp
from fewstep.samplers.dpm_solver_v3 import Statistics, derivatives, dpm_solver_v3, nested_derivatives
from fewstep.samplers.grids import End, grid
from fewstep.samplers.plan import SamplingConfig, plan
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.statistics import Progress, estimate_statistics
from fewstep.samplers.unipc import unipc

M, K = 0.7, 0.5


def constant_statistics(intervals: int, l: float, s: float) -> Statistics:  # noqa: E741 - the paper's letter
    ones = torch.ones(intervals + 1, 2, dtype=torch.float64)
    return Statistics(torch.linspace(LOW, HIGH, intervals + 1, dtype=torch.float64), l * ones, s * ones, 0 * ones)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_with_l_one_and_s_zero_it_equals_plus_plus_with_taylor_weights(order: int) -> None:
    times = by_log_snr(VP, 8)
    got = dpm_solver_v3(mixture(), NOISE, times, constant_statistics(9600, 1.0, 0.0), order=order, correct=False)
    expected = multistep_pp(mixture(), NOISE, times, order=order, relaxation="none")
    assert (got - expected).abs().max() < 1e-6


def test_with_l_zero_and_s_minus_one_it_equals_the_noise_form() -> None:
    times = by_log_snr(VP, 8)
    got = dpm_solver_v3(mixture(), NOISE, times, constant_statistics(9600, 0.0, -1.0), order=1, correct=False)
    assert (got - multistep_pp(mixture(), NOISE, times, order=1)).abs().max() < 1e-6


def exact_statistics(schedule: NoiseSchedule, intervals: int = 4000) -> Statistics:
    """Of N(M, K^2): l = sigma^2 / v, v = alpha^2 K^2 + sigma^2; f = -l M for every x, so s = 0 and b = f'."""
    log_snr = torch.linspace(LOW, HIGH, intervals + 1, dtype=torch.float64)
    t = schedule.time_of_log_snr(log_snr)
    variance = (schedule.alpha(t) * K) ** 2 + schedule.sigma(t) ** 2
    l = (schedule.sigma(t) ** 2 / variance)[:, None].repeat(1, 2)  # noqa: E741
    return Statistics(log_snr, l, torch.zeros_like(l), 2 * l * (1 - l) * M)


@pytest.mark.parametrize("schedule", [VP, RectifiedFlow(), VE()], ids=["vp", "flow", "edm"])
def test_one_step_is_exact_on_gaussian_data(schedule: NoiseSchedule) -> None:
    model = MixtureBackbone(GaussianMixture.single(M, K, 2), schedule)
    predict = Predictor(Denoiser(model, schedule, "x0"), Condition())
    times = by_log_snr(schedule, 1)
    s, t = predict.nodes(times)
    got = dpm_solver_v3(predict, NOISE, times, exact_statistics(schedule), order=1)
    scale = math.hypot(t.alpha * K, t.sigma) / math.hypot(s.alpha * K, s.sigma)
    assert (got - (t.alpha * M + (NOISE - s.alpha * M) * scale)).abs().max() < 1e-6
    assert predict.nfe == 1


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    file = tmp_path_factory.mktemp("fit") / "statistics.safetensors"
    x0 = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6]).sample(2048, 1).float()
    estimate_statistics(mixture().denoiser, x0, Condition(), file, guidance=Guidance(), intervals=150, batch=2048)
    return Statistics.read(file)


def test_estimated_statistics_reduce_the_error(estimated: Statistics) -> None:
    truth = unipc(mixture(), NOISE, by_log_snr(VP, 400), order=3)
    for steps in (5, 10):
        times = by_log_snr(VP, steps)
        errors = [
            (rule(mixture(), NOISE, times) - truth).square().mean().sqrt().item()
            for rule in (
                partial(multistep_pp, relaxation="none"),
                partial(dpm_solver_v3, statistics=estimated, order=3),
            )
        ]
        assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_estimated_statistics_of_gaussian_data_equal_the_exact_ones(mode: str, tmp_path: Path) -> None:
    flow = RectifiedFlow()
    model = MixtureBackbone(GaussianMixture.single(M, K, 2), flow)
    denoiser = Denoiser(_NoForwardMode(model) if mode == "backward" else model, flow, "x0")
    x0 = M + K * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "statistics.safetensors"
    estimate_statistics(denoiser, x0, Condition(), file, guidance=Guidance(), intervals=24, batch=4000)
    stats = Statistics.read(file)
    t = flow.time_of_log_snr(stats.log_snr)
    exact = flow.sigma(t) ** 2 / ((flow.alpha(t) * K) ** 2 + flow.sigma(t) ** 2)
    torch.testing.assert_close(stats.l[:, 0], exact, rtol=1e-4, atol=1e-5)
    f_prime = stats.b + stats.s * (-stats.l * M)  # f = -l M
    torch.testing.assert_close(f_prime[3:-3, 0], (2 * exact * (1 - exact) * M)[3:-3], rtol=0.1, atol=0.02)


class _Identity(torch.autograd.Function):
    """A layer without forward-mode differentiation."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class _NoForwardMode(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return _Identity.apply(self.model(x_t, t, condition))


def test_an_interrupted_estimation_continues(tmp_path: Path) -> None:
    x0 = NOISE[:16].float()

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise Interrupted

    def run(file: Path, progress: Progress | None = None, seed: int = 0) -> None:
        estimate_statistics(
            mixture().denoiser, x0, Condition(), file, guidance=Guidance(), intervals=14, seed=seed, progress=progress
        )

    run(tmp_path / "full.safetensors")
    for last, first_missing in ((17, 16), (27, 26)):  # after all slopes; after ten rows more

        def stop_later(done: int, total: int, last: int = last) -> None:
            if done == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(tmp_path / "late.safetensors", stop_later)
        continued: list[tuple[int, int]] = []
        run(tmp_path / "late.safetensors", lambda *progress, seen=continued: seen.append(progress))
        assert continued == [(k, 30) for k in range(first_missing, 31)]
        (tmp_path / "late.safetensors").unlink()
    with pytest.raises(Interrupted):
        run(tmp_path / "half.safetensors", stop)
    with pytest.raises(UserError, match="statistics with other settings"):
        run(tmp_path / "half.safetensors", seed=1)
    seen: list[int] = []
    run(tmp_path / "half.safetensors", lambda done, total: seen.append(done))
    assert seen[0] == 11, "ten rows were saved"
    full, half = (Statistics.read(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    assert all(torch.equal(a, b) for a, b in zip((full.l, full.s, full.b), (half.l, half.s, half.b), strict=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full.safetensors", "half.safetensors"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("l", lambda rows: rows[:, :1]), ("l", lambda rows: torch.cat([rows] * 4)), ("l", lambda rows: rows / 0),
        ("l", lambda rows: rows.double()), ("k", lambda rows: rows), ("m", lambda rows: rows),
    ],
)  # fmt: skip
def test_damaged_rows_of_an_interrupted_estimation_are_refused(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 12:
            raise InterruptedError

    file = tmp_path / "s.safetensors"

    def run(progress: Progress | None = None) -> None:
        estimate_statistics(
            mixture().denoiser, NOISE[:4].float(), Condition(), file, guidance=Guidance(), intervals=14,
            progress=progress,
        )  # fmt: skip

    with pytest.raises(InterruptedError):
        run(stop)
    kept = tmp_path / "s.partial.safetensors"
    save_file({name: change(read_tensors(kept)["l"]).contiguous()}, kept, read_metadata(kept))
    with pytest.raises(UserError, match=rf"is damaged \(its rows {name}\): delete it"):
        run()
    assert not file.exists()


@pytest.mark.parametrize(("order", "pseudo"), [(1, False), (2, False), (2, True)])
def test_the_error_falls_with_the_order(order: int, pseudo: bool) -> None:
    """With any smooth statistics. The corrector adds accuracy here, but the first step limits the slope."""
    log_snr = torch.linspace(LOW, HIGH, 4801, dtype=torch.float64)
    columns = (torch.sigmoid(-2 * log_snr), -0.5 + 0.2 * torch.sin(log_snr), 0.1 * torch.cos(log_snr))
    stats = Statistics(log_snr, *(column[:, None].repeat(1, 2) for column in columns))
    truth = unipc(mixture(), NOISE, by_log_snr(VP, 400), order=3)
    rule = partial(dpm_solver_v3, statistics=stats, order=order, correct=order > 1, pseudo=pseudo)
    errors = [(rule(mixture(), NOISE, by_log_snr(VP, n)) - truth).square().mean().sqrt().item() for n in (20, 40, 80)]
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(order, abs=0.16)


@pytest.mark.parametrize("steps", [20, 50, 100])
def test_it_takes_the_steps_that_are_asked_for_whatever_the_number_of_statistics(
    estimated: Statistics, steps: int
) -> None:
    few = Statistics(*(values[::25] for values in (estimated.log_snr, estimated.l, estimated.s, estimated.b)))
    predict = mixture()
    x = dpm_solver_v3(predict, NOISE, by_log_snr(VP, steps), few, order=2, pseudo=True)
    assert predict.nfe == steps
    truth = unipc(mixture(), NOISE, by_log_snr(VP, 400), order=3)
    assert (x - truth).square().mean().sqrt() < 0.02


@pytest.mark.parametrize("end", ["zero", "minimum"])
def test_only_the_last_step_is_of_first_order(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[int] = []
    original = dpm_solver_v3_module.take_step

    def recorded(*arguments: object) -> Tensor:
        orders.append(len(arguments[4]))  # type: ignore[arg-type]
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dpm_solver_v3_module, "take_step", recorded)
    stats = constant_statistics(200, 0.5, -0.2)
    dpm_solver_v3(mixture(), NOISE, grid(VP, 6, end=end), stats, order=3, correct=False)
    assert orders == ([1, 2, 3, 3, 2] if end == "zero" else [1, 2, 3, 3, 2, 1])  # x0 itself at sigma = 0


def test_statistics_are_used_at_the_guidance_and_with_the_weights_that_they_were_measured_at(tmp_path: Path) -> None:
    teacher, other = (load_model(tiny_teacher(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 1)))
    assert teacher.path is not None
    assert other.path is not None
    file = teacher.path / "statistics.safetensors"
    solvers.fit_v3(teacher.path, file, n=2, intervals=4, guidance=2.0, device="cpu")
    plan(teacher, SamplingConfig("dpm_solver_v3_2", 3, 2.0))
    with pytest.raises(UserError, match="measured at guidance 2 and do not fit guidance 1: run fewstep solver fit-v3"):
        plan(teacher, SamplingConfig("dpm_solver_v3_2", 3))
    solvers.fit_v3(teacher.path, teacher.path / "statistics-1.safetensors", n=2, intervals=4, device="cpu")
    plan(teacher, SamplingConfig("dpm_solver_v3_2", 3))
    plan(teacher, SamplingConfig("dpm_solver_v3_2", 3, 2.0))
    (other.path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="fitted to other weights than this model's"):
        plan(other, SamplingConfig("dpm_solver_v3_2", 3, 2.0))


def test_the_solvers_of_a_model_run_with_its_statistics_and_pseudo_orders(tmp_path: Path) -> None:
    teacher = load_model(tiny_teacher(tmp_path))
    log_snr = torch.linspace(-7.0, 7.0, 60, dtype=torch.float64)
    columns = {"l": torch.sigmoid(-2 * log_snr), "s": -0.2 * torch.ones(60), "b": 0.1 * torch.cos(log_snr)}
    tensors = {name: value.float()[:, None, None, None].repeat(1, 1, 8, 8) for name, value in columns.items()}
    write_tensors({"log_snr": log_snr, **tensors}, tmp_path / "statistics.safetensors")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    predict = Predictor(teacher.denoiser, Condition.of_labels(torch.tensor([3, 5]), 10))
    for order in (2, 3):
        request = plan(teacher, SamplingConfig(f"dpm_solver_v3_{order}", 5))
        stats = Statistics.read(tmp_path / "statistics.safetensors")
        with torch.inference_mode():
            got = request.solver(predict, x, request.times, lambda: x)
            assert torch.equal(got, dpm_solver_v3(predict, x, request.times, stats, order=order, pseudo=True))
            assert got.isfinite().all()
            assert not torch.equal(got, dpm_solver_v3(predict, x, request.times, stats, order=order, pseudo=False))


def test_a_step_costs_at_most_three_times_one_of_unipc(estimated: Statistics) -> None:
    """Beside the network, as the median over paired rounds; the exponentials of the statistics are computed once."""

    class Identity(torch.nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return x_t

    shape, times = (1, 28, 28), grid(RectifiedFlow(), 10, t_max=0.999)
    image = Statistics(
        estimated.log_snr, *(v[:, :1, None, None].repeat(1, *shape) for v in (estimated.l, estimated.s, estimated.b))
    )
    predict = Predictor(Denoiser(Identity(), RectifiedFlow(), "velocity"), Condition())
    x = torch.randn(8, *shape)

    def seconds(rule: Callable[[Predictor, Tensor, Sequence[float]], Tensor]) -> float:
        start = time.perf_counter()
        rule(predict, x, times)
        return time.perf_counter() - start

    v3 = partial(dpm_solver_v3, statistics=image, order=2, pseudo=True)
    with torch.inference_mode():
        seconds(v3)
        ratios = [seconds(v3) / seconds(unipc) for _ in range(31)]
    assert statistics.median(ratios) <= 3


def test_missing_or_foreign_statistics_are_refused_with_the_command_that_creates_them(tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    for _ in range(2):
        with pytest.raises(UserError, match=r"statistics\.safetensors: run fewstep solver fit-v3"):
            Statistics.read(file)
        write_tensors({"l": torch.zeros(3)}, file)


def test_derivatives_of_a_cubic_come_from_differences() -> None:
    def polynomial(r: float) -> Tensor:
        return torch.tensor([1.0 + 2 * r - 3 * r**2 + 0.5 * r**3], dtype=torch.float64)

    offsets = [0.0, -0.4, 0.7, -1.1]
    values = [polynomial(r) for r in offsets]
    assert [d.item() for d in derivatives(values, offsets)] == pytest.approx([2.0, -6.0, 3.0])
    assert nested_derivatives(values, offsets)[-1].item() == pytest.approx(3.0)
    assert nested_derivatives(values[:2], offsets[:2])[0].item() == derivatives(values[:2], offsets[:2])[0].item()
    assert derivatives(values[:1], offsets[:1]) == []
