"""Numbers out of range and values that are not finite are refused in words, before there is an image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from safetensors.torch import save_file
from torch import Tensor
from worlds import FLOW, MIXTURE, NOISE, VP, by_log_snr, mixture, tiny_teacher

from fewstep.api import solvers
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.mixture import MixtureBackbone
from fewstep.samplers.generate import integrate
from fewstep.samplers.grids import time_uniform
from fewstep.samplers.plan import Plan
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, STUDENT_SOLVERS
from fewstep.samplers.unipc import unipc


class NotFiniteBelow(MixtureBackbone):
    """The exact model of the mixture, but NaN at times up to ``limit``."""

    def __init__(self, limit: float) -> None:
        super().__init__(MIXTURE, FLOW)
        self.limit = limit

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return super().forward(x_t, t, condition).where(t[0] > self.limit, math.nan)


@pytest.mark.parametrize("name", ["euler", "unipc_2", "heun", "dpmpp_2s", "ddpm", "renoise"])
def test_a_sample_that_is_not_finite_names_solver_and_step(name: str) -> None:
    plan = Plan((SOLVERS | STUDENT_SOLVERS)[name], (0.9, 0.7, 0.5, 0.3, 0.0))
    step = 2 if name == "dpmpp_2s" else 3  # its second evaluation is within the step from 0.7
    denoiser = Denoiser(NotFiniteBelow(0.62), FLOW, "x0")
    message = rf"Sampling with {name} failed: the model's output is not finite in step {step} of 4"
    with pytest.raises(UserError, match=message):
        integrate(denoiser, Condition(), (2,), plan=plan, numbers=range(4))


def test_a_solver_that_diverges_is_named_with_its_step() -> None:
    def run(predict: Predictor, x: Tensor, times: Any) -> Tensor:
        predict(x, times[0])
        predict(x / 0, times[1])
        return x / 0

    plan = Plan(type(SOLVERS["euler"])(run, 1, 1, "none"), time_uniform(2))
    denoiser = Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0")
    with pytest.raises(UserError, match=r"Sampling with this solver failed: the state is not finite in step 1 of 2"):
        integrate(denoiser, Condition(), (2,), plan=plan, numbers=range(4))


def test_weights_that_are_not_finite_give_an_error_and_no_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    file = teacher / "model.safetensors"
    tensors = read_tensors(file)
    tensors["enter.weight"][0] = math.nan
    save_file(tensors, file)
    message = refused(capsys, "sample", teacher, "--solver", "unipc_2", "--steps", 3, "--out", tmp_path / "x.png")
    assert "Sampling with unipc_2 failed: the model's output is not finite in step 1 of 3" in message
    assert not (tmp_path / "x.png").exists()


def test_an_error_refuses_a_guidance_that_is_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    message = refused(capsys, "sample", teacher, "--guidance", "nan", "--out", tmp_path / "x.png")
    assert "guidance must be a finite number, got nan" in message
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("times", [(0.2, 0.9), (0.9, 0.9, 0.1), (1.2, 0.5), (0.5, -0.1), (0.9, math.nan), (0.5,)])
def test_times_that_do_not_decrease_are_refused(times: tuple[float, ...]) -> None:
    for name in ("euler", "heun", "ddim", "unipc_2"):
        with pytest.raises(ValueError, match="two or more decreasing times within"):
            SOLVERS[name](mixture(), NOISE, times, lambda: NOISE)
    if len(times) > 1:
        with pytest.raises(ValueError, match="two or more decreasing times within"):
            unipc(mixture(), NOISE, times)


@pytest.mark.parametrize("name", ["unipc_2", "dpmpp_2s", "sde_dpmpp_2m"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_in_half_precision_is_integrated_in_float32(name: str, dtype: torch.dtype) -> None:
    times = by_log_snr(VP, 40)
    received: set[torch.dtype] = set()

    class Recorded(MixtureBackbone):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            received.add(x_t.dtype)
            return super().forward(x_t, t, condition)

    x, noise = NOISE.to(dtype), torch.zeros_like(NOISE).to(dtype)
    predict = Predictor(Denoiser(Recorded(MIXTURE, VP), VP, "x0"), Condition())
    got = SOLVERS[name](predict, x, times, lambda: noise)
    assert got.dtype == dtype
    assert received == {dtype}, "the network receives what it was given"
    predict = Predictor(Denoiser(MixtureBackbone(MIXTURE, VP), VP, "x0"), Condition(), input_dtype=dtype)
    expected = SOLVERS[name](predict, x.float(), times, lambda: noise.float())
    assert torch.equal(got, expected.to(dtype))
    exact = SOLVERS[name](mixture(), x.double(), times, lambda: noise.double())
    assert (got.double() - exact).abs().max() < 0.1
    with pytest.raises(UserError, match="state must be float32 or float64, not torch"):
        unipc(mixture(), x, times)


def test_a_noise_prediction_at_pure_noise_is_refused_in_words() -> None:
    predict = Predictor(Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "noise"), Condition())
    with pytest.raises(UserError, match="A prediction of noise does not determine x0 where alpha = 0 and sigma = 1"):
        unipc(predict, NOISE, (1.0, 0.5, 0.0))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare fashion --solvers ddim --nfe 4 --n 0", "n must be at least 1, got 0"),
        ("compare fashion --solvers ddim --nfe 0", "a number of evaluations must be at least 1, got 0"),
        ("compare fashion --solvers ddim --nfe 4 --long 0", "long must be at least 1, got 0"),
        ("compare fashion --solvers ddim --nfe 4 --guidance nan", "guidance must be a finite number"),
        ("compare fashion --solvers unipc_3 --nfe 20 --grids log_snr --long 20", "is the long run itself"),
        ("fit-v3 fashion --intervals 0 --out {out}", "intervals must be at least 1, got 0"),
        ("fit-v3 fashion --n 0 --out {out}", "n must be at least 1, got 0"),
        ("fit-dc fashion --n 0 --out {out}", "n must be at least 1, got 0"),
        ("fit-dc fashion --steps 0 --out {out}", "a number of steps must be at least 1, got 0"),
        ("fit-dc fashion --guidance inf --out {out}", "guidance must be a finite number, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command.format(out=tmp_path / "file").split()
    extra = ["--out", tmp_path / "folder"] if arguments[0] == "compare" else []
    assert message in refused(capsys, "solver", *arguments, *extra)
    assert not list(tmp_path.iterdir())


def test_an_empty_batch_and_a_single_round_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "Input should be greater than or equal to"
    out = ("--out", tmp_path / "out")
    assert f"'--batch': {message} 1" in refused(capsys, "sample", "fashion-text", "--batch", 0, *out)
    assert f"'--batch': {message} 1" in refused(capsys, "bench", "sampler", "fashion", "--batch", 0)
    assert f"'--rounds': {message} 2" in refused(capsys, "bench", "sampler", "fashion", "--rounds", 1)


def test_statistics_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    tensors = read_tensors(teacher / "model.safetensors")
    tensors["enter.weight"][0] = math.nan
    save_file(tensors, teacher / "model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        solvers.fit_v3(teacher, tmp_path / "statistics.safetensors", n=2, intervals=2, device="cpu")
    assert not (tmp_path / "statistics.safetensors").exists()
