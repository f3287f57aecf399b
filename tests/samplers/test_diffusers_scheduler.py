"""Agreement with diffusers: its classes on the same nodes, our rules in its pipelines, its schedulers as our rules."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import stable_diffusion
from torch import Tensor
from worlds import NOISE, by_log_snr, mixture

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import load_model
from fewstep.models.schedules import RectifiedFlow, VPDiscrete
from fewstep.samplers.dpm_solver_pp import multistep_pp, singlestep_pp
from fewstep.samplers.grids import T_MAX, grid, grid_of
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS
from fewstep.samplers.unipc import unipc

diffusers = pytest.importorskip("diffusers")
from fewstep.samplers.diffusers_scheduler import RULES, FewstepScheduler  # noqa: E402


def run_diffusers(scheduler: Any, times: list[float], x: Tensor) -> Tensor:
    """A diffusers scheduler on our nodes, in float64, with the exact x0 of the mixture."""
    predict = mixture(VPDiscrete.scaled_linear())
    nodes = predict.nodes(times)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor([math.exp(-n.log_snr) for n in nodes], dtype=torch.float64)
    for node, timestep in zip(nodes[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(predict(x, node.t).x0, timestep, x, return_dict=False)[0]
    return x


COMMON = {"prediction_type": "sample", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor]]] = {
    "++1": ("DPMSolverMultistepScheduler", {"solver_order": 1}, partial(multistep_pp, order=1)),
    "++2M midpoint": ("DPMSolverMultistepScheduler", {"solver_order": 2}, multistep_pp),
    "++2M Taylor": (
        "DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"},
        partial(multistep_pp, relaxation="none"),
    ),
    "++3M as published": ("DPMSolverMultistepScheduler", {"solver_order": 3}, partial(multistep_pp, order=3)),
    "UniPC-2 bh2": ("UniPCMultistepScheduler", {"solver_order": 2}, unipc),
    "UniPC-3 bh2": ("UniPCMultistepScheduler", {"solver_order": 3}, partial(unipc, order=3)),
    "UniPC-2 bh1": (
        "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, partial(unipc, variant="bh1")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CLASSES))
def test_solvers_agree_with_diffusers_classes_on_the_same_nodes(name: str) -> None:
    cls, settings, ours = CLASSES[name]
    settings = {**settings, "final_sigmas_type": "sigma_min"}
    schedule = VPDiscrete.scaled_linear()
    times = by_log_snr(schedule, 10, -2.0, 3.0)
    got = ours(mixture(schedule), NOISE, times)
    expected = run_diffusers(getattr(diffusers, cls)(**COMMON, **settings), times, NOISE)
    assert (got - expected).abs().max() < 1e-6


def test_diffusers_2s_agrees_if_every_second_node_is_a_midpoint() -> None:
    schedule = VPDiscrete.scaled_linear()
    fine = by_log_snr(schedule, 10, -2.0, 3.0)  # every second node is a midpoint
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **COMMON, solver_order=2, final_sigmas_type="sigma_min", lower_order_final=False
    )
    expected = run_diffusers(scheduler, fine, NOISE)
    assert (singlestep_pp(mixture(schedule), NOISE, fine[::2]) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("rule", list(RULES))
def test_a_pipeline_with_our_scheduler_gives_the_samples_of_our_solver(
    rule: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    model = load_model(folder, size=(16, 16, 1))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipeline.scheduler = FewstepScheduler.from_scheduler(pipeline.scheduler, rule)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        prompt_embeds=prompt, num_inference_steps=6, guidance_scale=1.0, latents=noise, output_type="latent",
        height=16, width=16,
    ).images  # fmt: skip
    predict = Predictor(model.denoiser, Condition({"prompt": prompt}))
    with torch.no_grad():
        ours = SOLVERS[rule](predict, noise, grid(model.denoiser.schedule, 6), lambda: noise)
    assert (ours - torch.as_tensor(theirs)).abs().max() / ours.abs().max() < 1e-4


def test_our_scheduler_keeps_its_settings_when_saved_and_loaded(tmp_path: Path) -> None:
    source = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = FewstepScheduler.from_scheduler(source, "dpmpp_2m", "log_snr")
    scheduler.save_pretrained(tmp_path)
    loaded = FewstepScheduler.from_pretrained(tmp_path)
    for each in (scheduler, loaded):
        each.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, loaded.timesteps)
    loaded.set_timesteps(sigmas=[1.0, 0.5])
    assert loaded.timesteps.tolist() == pytest.approx([1000 * T_MAX, 750.0])
    with pytest.raises(UserError, match="did you mean 'unipc_2'"):
        FewstepScheduler.from_scheduler(diffusers.DDIMScheduler(), "unipc2")


FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def test_a_new_scheduler_has_no_timesteps_and_a_thousand_training_timesteps() -> None:
    ours = FewstepScheduler(shift=2.0)
    assert len(ours) == 1000
    assert (len(ours.timesteps), len(ours.sigmas)) == (0, 0)
    assert ours.begin_index is ours.step_index is None
    again, unused = FewstepScheduler.from_config(ours.config, return_unused_kwargs=True)
    assert (again.config["shift"], unused) == (2.0, {})
    ours.set_timesteps(4)
    ours.set_begin_index()
    assert ours.begin_index == 0


def test_noise_levels_are_computed_in_float64_and_stored_in_float32() -> None:
    for spacing in (None, "time", "log_snr"):
        ours = FewstepScheduler.from_scheduler(FLOW(shift=3.0), "ddim", spacing)
        ours.set_timesteps(7)
        times = grid_of(RectifiedFlow(), 7, spacing or "time", factor=3.0)
        assert torch.equal(ours.sigmas, torch.tensor(times))
        assert torch.equal(ours.timesteps, torch.tensor([1000 * t for t in times[:-1]]))
        assert ours.num_inference_steps == 7
        ours.set_timesteps(sigmas=[1 - k / 7 for k in range(7)])
        assert torch.equal(ours.sigmas, torch.tensor(times)), "uniform sigmas are a number of steps"
    rounded = FewstepScheduler.from_scheduler(FLOW(), spacing="karras")
    rounded.set_timesteps(sigmas=[1.0, 0.6667, 0.3333])
    assert rounded.num_inference_steps == 3
    own = FewstepScheduler.from_scheduler(FLOW(), "ddim", "time")
    own.set_timesteps(sigmas=[1.0, 0.4])
    assert own.timesteps.tolist() == [1000, 400]


def test_levels_of_a_discrete_schedule_lie_within_its_range() -> None:
    ours = FewstepScheduler.from_scheduler(diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"))
    ours.set_timesteps(sigmas=[1000.0, 1.0])
    assert ours.timesteps[0] == pytest.approx(999), "the noisiest"
    ours.set_timesteps(timesteps=[500, 0.25])
    assert ours.timesteps.tolist() == pytest.approx([500, 0.25], abs=1e-4)


def test_a_run_starts_at_the_begin_index_whatever_the_timestep() -> None:
    ours = FewstepScheduler.from_scheduler(FLOW(), "ddim")
    ours.set_timesteps(8)
    assert ours.index_for_timestep(500, torch.tensor([900.0, 510.0])) == 1
    ours.set_begin_index(5)
    ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2))
    assert ours.step_index == 6


def test_samples_are_noised_each_to_its_own_level_and_keep_their_type() -> None:
    ours = FewstepScheduler.from_scheduler(FLOW(), "ddim")
    ours.set_timesteps(4)
    x, noise = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    noisy = ours.add_noise(x, noise, torch.tensor([250.0, 750.0]))
    torch.testing.assert_close(noisy[:, 0, 0, 0], torch.tensor([0.75, 0.25]))
    assert (noisy == noisy[:, :1, :1, :1]).all()
    half = ours.step(x.half(), ours.timesteps[0], x.half()).prev_sample
    assert half.dtype == torch.float16


def one_step(x0: Tensor, **settings: Any) -> Tensor:
    """What a single step to clean data returns: x0 itself, limited by the settings."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    ours = FewstepScheduler("ddim", prediction_type="sample", **betas, **settings)
    ours.set_timesteps(1)
    result: Tensor = ours.step(x0, ours.timesteps[0], torch.zeros_like(x0)).prev_sample
    return result


def test_x0_is_limited_sample_by_sample() -> None:
    x0 = torch.stack([torch.linspace(-0.5, 0.5, 101), torch.linspace(-1.5, 1.5, 101), torch.linspace(-4, 4, 101)])
    limits = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 2.0}
    got = one_step(x0, **limits)
    torch.testing.assert_close(got[0], x0[0], msg="within -1..1")
    torch.testing.assert_close(got[1], x0[1] / 1.5, msg="the quantile, here the largest value")
    torch.testing.assert_close(got[2], x0[2].clamp(-2, 2) / 2, msg="the largest limit")
    torch.testing.assert_close(one_step(x0, clip_sample=True), x0.clamp(-1, 1))
    torch.testing.assert_close(one_step(x0, clip_sample=True, clip_sample_range=3.0), x0.clamp(-3, 3))
    torch.testing.assert_close(one_step(x0, clip_sample=False), x0)


def test_a_step_takes_at_most_half_the_time_of_diffusers() -> None:
    """With a trivial network: the median over paired rounds, which include the set-up of the schedule."""

    class Identity(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            return x_t

    schedule, x, steps = VPDiscrete.scaled_linear(), torch.randn(1, 4, 8, 8), 20
    denoiser, times = Denoiser(Identity(), schedule, "noise"), grid(schedule, steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear")

    def ours() -> None:
        SOLVERS["dpmpp_2m"](Predictor(denoiser, Condition()), x, times, lambda: x)

    def theirs() -> None:
        scheduler.set_timesteps(steps)
        y = x
        for timestep in scheduler.timesteps:
            y = scheduler.step(y, timestep, y, return_dict=False)[0]

    def seconds(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    with torch.no_grad():
        ours()
        ratios = [seconds(ours) / seconds(theirs) for _ in range(15)]
    assert statistics.median(ratios) <= 0.5
