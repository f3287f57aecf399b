"""Our rules in diffusers pipelines, and diffusers' schedulers as our rules."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_pipelines import stable_diffusion

from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import load_model
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.schedules import RectifiedFlow, VPDiscrete
from fewstep.samplers.grids import MOST, grid
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS

diffusers = pytest.importorskip("diffusers")
from fewstep.samplers.diffusers_scheduler import RULES, FewstepScheduler, diffusers_rule  # noqa: E402

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6])
NOISE = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", list(RULES))
def test_a_pipeline_with_our_scheduler_samples_as_our_solver(
    rule: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    model = load_model(folder, size=(16, 16, 1))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipeline.scheduler = FewstepScheduler.of(pipeline.scheduler, rule)
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


def test_our_scheduler_is_saved_and_loaded_with_its_settings(tmp_path: Path) -> None:
    scheduler = FewstepScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "dpmpp_2m", "log_snr")
    scheduler.save_pretrained(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    for each in (scheduler, again):
        each.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, again.timesteps)
    again.set_timesteps(sigmas=[1.0, 0.5])
    assert again.timesteps.tolist() == pytest.approx([1000 * MOST, 750.0])
    with pytest.raises(UserError, match="did you mean 'unipc_2'"):
        FewstepScheduler.of(diffusers.DDIMScheduler(), "unipc2")


SCHEDULERS: dict[str, Callable[[], object]] = {
    "ddim": lambda: diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(
        1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="trailing"
    ),
    "heun": lambda: diffusers.HeunDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="trailing"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_diffusers_scheduler_is_one_of_our_rules(name: str) -> None:
    """With many steps every one of them ends where our solver does; DDIM on the same nodes at once."""
    schedule = RectifiedFlow() if name == "flow" else VPDiscrete.scaled_linear()
    predict = Predictor(Denoiser(MixtureBackbone(MIXTURE, schedule), schedule, "x0"), Condition())
    steps = 10 if name == "ddim" else 250
    started = predict.nodes([1.0])[0].sigma  # diffusers' DDIM starts from noise of deviation 1
    got = diffusers_rule(SCHEDULERS[name]())(predict, started * NOISE, grid(schedule, steps))
    if name == "ddim":
        ours = SOLVERS["ddim"](predict, NOISE, grid(schedule, steps), lambda: NOISE)
    else:
        ours = SOLVERS["unipc_2"](predict, started * NOISE, grid(schedule, steps, most=MOST), lambda: NOISE)
    assert (got - ours).abs().max() < {"ddim": 1e-4, "flow": 0.1}.get(name, 0.05)


def test_a_step_costs_at_most_half_of_diffusers() -> None:
    """On a network that does nothing, medians of paired rounds, both with the schedule's set-up."""

    class Nothing(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            return x_t

    schedule, x, steps = VPDiscrete.scaled_linear(), torch.randn(1, 4, 8, 8), 20
    denoiser, times = Denoiser(Nothing(), schedule, "noise"), grid(schedule, steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear")

    def ours() -> None:
        SOLVERS["dpmpp_2m"](Predictor(denoiser, Condition()), x, times, lambda: x)

    def theirs() -> None:
        scheduler.set_timesteps(steps)
        y = x
        for label in scheduler.timesteps:
            y = scheduler.step(y, label, y, return_dict=False)[0]

    def seconds(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    with torch.no_grad():
        ours()
        ratios = [seconds(ours) / seconds(theirs) for _ in range(15)]
    assert statistics.median(ratios) <= 0.5
