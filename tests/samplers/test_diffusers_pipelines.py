"""fewstep's scheduler in diffusers' pipelines of every family: against diffusers' own scheduler of the same rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY, Tiny, called
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.models.hub.folder import PipelineFolder
from fewstep.samplers.grids import T_MAX

diffusers = pytest.importorskip("diffusers")
from fewstep.samplers.diffusers_scheduler import RULES, FewstepScheduler  # noqa: E402

DISCRETE = ("sd", "sd2", "sdxl", "pixart")
DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "max_shift": 2.5}


def embeddings(tiny: Tiny, n: int) -> dict[str, Tensor]:
    """Random embeddings of prompts, by the names of the call's arguments."""
    return {tiny.arguments[name]: value for name, value in tiny.embeddings(n, 1).items()}


def latents(tiny: Tiny, folder: PipelineFolder, pipeline: Any) -> Tensor:
    return called(tiny, folder, pipeline, 1.0, output_type="latent", **embeddings(tiny, 2))[1]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PipelineFolder, Any]]:
    made: dict[str, tuple[PipelineFolder, Any]] = {}

    def get(name: str) -> tuple[PipelineFolder, Any]:
        if name not in made:
            pipeline = TINY[name].build()
            pipeline.set_progress_bar_config(disable=True)
            folder = tmp_path_factory.mktemp(name)
            pipeline.save_pretrained(folder)
            made[name] = PipelineFolder.open(folder), pipeline
        return made[name]

    return get


def schedulers(name: str, pipeline: Any) -> tuple[Any, Any]:
    """diffusers' scheduler of first order and ours, on the same times."""
    if name not in DISCRETE:
        settings = DYNAMIC if name in ("flux", "qwen_image") else {"shift": 3.0}
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    else:
        theirs = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=0
        )
    return theirs, FewstepScheduler.from_scheduler(theirs, "ddim")


def use_uniform_sigmas(name: str, theirs: Any) -> None:
    """Where the pipeline leaves the sigmas to diffusers' scheduler: those that ours takes."""
    if name == "sd3" or name.startswith("wan"):
        set_timesteps = theirs.set_timesteps
        theirs.set_timesteps = lambda n, device=None: set_timesteps(sigmas=[1 - k / n for k in range(n)], device=device)


@pytest.mark.parametrize("name", list(TINY))
def test_every_family_runs_and_equals_diffusers_scheduler_of_the_same_rule(
    name: str, pipelines: Callable[[str], tuple[PipelineFolder, Any]]
) -> None:
    folder, pipeline = pipelines(name)
    theirs, ours = schedulers(name, pipeline)
    pipeline.scheduler = theirs
    if name == "sd3" or name.startswith(
        "wan"
    ):  # pipelines that leave the sigmas to the scheduler: give both the same ones
        set_timesteps = theirs.set_timesteps
        theirs.set_timesteps = lambda n, device=None: set_timesteps(sigmas=[1 - k / n for k in range(n)], device=device)
    expected = latents(TINY[name], folder, pipeline)
    pipeline.scheduler = ours
    for _ in range(2):  # several calls
        got = latents(TINY[name], folder, pipeline)
        assert (got - expected).abs().max() / expected.abs().max() < 2e-3
    for rule in RULES:
        pipeline.scheduler = FewstepScheduler.from_scheduler(ours, rule)
        assert latents(TINY[name], folder, pipeline).isfinite().all()


def test_stable_diffusion_35_shifts_by_resolution(
    pipelines: Callable[[str], tuple[PipelineFolder, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline computes mu from the scheduler's settings, with other limits than the defaults, too."""
    folder, pipeline = pipelines("sd3")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    ours = FewstepScheduler.from_scheduler(theirs, "ddim")
    set_timesteps = theirs.set_timesteps
    monkeypatch.setattr(
        theirs, "set_timesteps",
        lambda n, device=None, mu=None: set_timesteps(sigmas=[1 - k / n for k in range(n)], device=device, mu=mu),
    )  # fmt: skip
    results = []
    for pipeline.scheduler in (theirs, ours):
        results.append(latents(TINY["sd3"], folder, pipeline))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, atol=1e-6, rtol=1e-5)
    assert (results[1] - results[0]).abs().max() / results[0].abs().max() < 2e-3
    assert not torch.allclose(ours.sigmas, torch.linspace(1, 0, len(ours.sigmas)), atol=1e-3), "it is shifted"


IMAGE_TO_IMAGE = {
    "sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline", "flux": "FluxImg2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
}  # fmt: skip
INPAINT = {"sd": "StableDiffusionInpaintPipeline", "flux": "FluxInpaintPipeline"}


def edited(cls: str, name: str, pipeline: Any, scheduler: Any, strength: float) -> Tensor:
    other = getattr(diffusers, cls)(**pipeline.components | {"scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    height, width, _ = TINY[name].size
    arguments: dict[str, Any] = embeddings(TINY[name], 1) | {TINY[name].scale: 1.0}
    if cls not in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"):
        arguments |= {"height": height, "width": width}
    if "Inpaint" in cls:
        arguments["mask_image"] = torch.zeros(1, 1, height, width)
        arguments["mask_image"][..., width // 2 :] = 1
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    return other(
        image=image, strength=strength, num_inference_steps=8, output_type="latent",
        generator=torch.Generator().manual_seed(0), **arguments,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for group in (IMAGE_TO_IMAGE, INPAINT) for name, cls in group.items()]
)
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_and_inpainting_equal_diffusers_scheduler_at_any_strength(
    cls: str, name: str, strength: float, pipelines: Callable[[str], tuple[PipelineFolder, Any]]
) -> None:
    _, pipeline = pipelines(name)
    theirs, ours = schedulers(name, pipeline)
    use_uniform_sigmas(name, theirs)
    expected, got = (edited(cls, name, pipeline, each, strength) for each in (theirs, ours))
    assert (got - expected).abs().max() / expected.abs().max() < 2e-3
    multistep = edited(cls, name, pipeline, FewstepScheduler.from_scheduler(theirs, "unipc_2"), strength)
    assert multistep.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"shift": 3.0}, {"shift": 3.0, "num_train_timesteps": 500}, DYNAMIC | {"time_shift_type": "linear"}, DYNAMIC,
        {"shift_terminal": 0.1}, {"shift": 2.0, "use_karras_sigmas": True}, {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True, "shift": 3.0},
    ],
    ids=str,
)  # fmt: skip
def test_the_noise_levels_are_those_of_the_flow_scheduler_that_it_replaces(settings: dict[str, Any]) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    ours = FewstepScheduler.from_scheduler(theirs, "ddim")
    sigmas = [1 - k / 6 for k in range(6)]
    for mu in (0.8, 1.3):  # ignored without dynamic shifting, as in FLUX.1-schnell's pipeline
        theirs.set_timesteps(sigmas=sigmas, mu=mu)
        ours.set_timesteps(sigmas=sigmas, mu=mu)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, atol=1e-3, rtol=1e-5)
    if settings.get("use_dynamic_shifting"):
        with pytest.raises(UserError, match=r"^This scheduler shifts by resolution: set_timesteps needs mu\.$"):
            ours.set_timesteps(sigmas=sigmas)


def test_sigmas_and_timesteps_of_a_discrete_scheduler_keep_their_meaning() -> None:
    source = diffusers.EulerDiscreteScheduler(500, 0.00085, 0.012, "scaled_linear")
    scheduler = FewstepScheduler.from_scheduler(source)
    scheduler.set_timesteps(timesteps=[499, 300, 100])
    assert scheduler.timesteps.tolist() == pytest.approx([499, 300, 100], abs=1e-3)
    rho = ((1 - source.alphas_cumprod) / source.alphas_cumprod) ** 0.5
    for given in ([rho[499], rho[300], rho[100]], [rho[499], rho[300], rho[100], 0.0]):
        scheduler.set_timesteps(sigmas=[float(value) for value in given])
        assert scheduler.timesteps.tolist() == pytest.approx([499, 300, 100], abs=0.05)
    assert scheduler.sigmas.tolist() == pytest.approx(
        [float(rho[k] / math.hypot(1, rho[k])) for k in (499, 300, 100)] + [0.0], abs=1e-4
    )
    karras = diffusers.DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear", use_karras_sigmas=True)
    ours = FewstepScheduler.from_scheduler(karras)
    ours.set_timesteps(6)
    nodes = FewstepScheduler.from_scheduler(source, spacing="karras")
    nodes.set_timesteps(6)
    root = ((ours.sigmas / (1 - ours.sigmas**2).sqrt()) ** (1 / 7))[:-1].double()
    torch.testing.assert_close(root.diff()[:-1], root.diff()[:1].expand(4), rtol=1e-3, atol=0)


def test_settings_that_would_have_no_effect_are_refused() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    for scheduler, message in (
        (flow(invert_sigmas=True), "invert_sigmas"),
        (flow(stochastic_sampling=True), "stochastic_sampling True"),
        (diffusers.EulerDiscreteScheduler(sigma_max=10.0), "sigma_max 10.0"),
        (diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), "final_sigmas_type 'sigma_min'"),
        (diffusers.LCMScheduler(), "A LCMScheduler belongs to a few-step student"),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
    ):
        with pytest.raises(UserError, match=message):
            FewstepScheduler.from_scheduler(scheduler)
    for spacing in ("karass", "log_snr5"):
        with pytest.raises(UserError, match=f"Unknown grid '{spacing}'; did you mean"):
            FewstepScheduler.from_scheduler(flow(), spacing=spacing)
    spaced = FewstepScheduler.from_scheduler(flow(), spacing="karras")
    with pytest.raises(UserError, match="the spacing 'karras' has no effect"):
        spaced.set_timesteps(sigmas=[1.0, 0.4])
    ours = FewstepScheduler.from_scheduler(flow())
    with pytest.raises(
        UserError, match=r"^A flow's scheduler takes sigmas \(noise levels before the shift\), not timesteps\.$"
    ):
        ours.set_timesteps(timesteps=[999, 500])
    with pytest.raises(UserError, match=r"^set_timesteps takes a number of steps, sigmas or timesteps\.$"):
        ours.set_timesteps()
    with pytest.raises(UserError, match="These timesteps do not work"):
        ours.set_timesteps(sigmas=[0.5, 0.8])
    ours.set_timesteps(1)
    x = torch.zeros(1, 4)
    with pytest.raises(UserError, match=r": a predicted variance must be removed first\.$"):
        ours.step(torch.zeros(1, 8), ours.timesteps[0], x)
    ours.step(x, ours.timesteps[0], x)
    with pytest.raises(UserError, match=r"^All timesteps have been used: call set_timesteps before another run\.$"):
        ours.step(x, ours.timesteps[0], x)


def test_thresholding_and_clipping_act_as_in_diffusers() -> None:
    x = 2 * torch.randn(3, 1, 5, 10, generator=torch.Generator().manual_seed(0))
    for settings in (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5, "clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 0.7},
    ):
        theirs = diffusers.DDIMScheduler(prediction_type="sample", timestep_spacing="trailing", **settings)
        ours = FewstepScheduler.from_scheduler(theirs, "ddim")
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(4)
        state = x
        for t, own in zip(theirs.timesteps[:3], ours.timesteps[:3], strict=True):
            expected = theirs.step(2 * x, t, state, use_clipped_model_output=True).prev_sample
            got = ours.step(2 * x, own, state).prev_sample
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            state = expected
            ours.set_begin_index(int(ours.index_for_timestep(own)) + 1)


def test_schedulers_are_exchanged_and_saved_without_loss(tmp_path: Path) -> None:
    sources = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500),
        diffusers.DDIMScheduler(
            800, 0.00085, 0.012, "scaled_linear", clip_sample=False, prediction_type="v_prediction"
        ),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"),
    )
    for number, source in enumerate(sources):
        ours = FewstepScheduler.from_scheduler(source, "dpmpp_2m", "log_snr:0.02")
        ours.save_pretrained(tmp_path / str(number))
        again = (
            FewstepScheduler.from_scheduler(ours),
            FewstepScheduler.from_config(ours.config),
            FewstepScheduler.from_pretrained(tmp_path / str(number)),
            FewstepScheduler.from_config(source.config, rule="dpmpp_2m", spacing="log_snr:0.02"),
            FewstepScheduler.from_scheduler(type(source).from_config(ours.config), "dpmpp_2m", "log_snr:0.02"),
        )
        ours.set_timesteps(5)
        for other in again:
            other.set_timesteps(5)
            assert torch.equal(other.timesteps, ours.timesteps)
            assert torch.equal(other.sigmas, ours.sigmas)
            assert other.config["rule"] == "dpmpp_2m"
            assert other.config.num_train_timesteps == source.config.num_train_timesteps
            x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
            states = []
            for scheduler in (ours, other):
                scheduler.set_timesteps(5)
                state = x
                for t in scheduler.timesteps:
                    state = scheduler.step(0.5 * state, t, state, return_dict=False)[0]
                states.append(state)
            assert torch.equal(*states)
    with pytest.raises(
        UserError, match=r"^The config has neither a class name nor betas nor a shift: use FewstepScheduler\."
    ):
        FewstepScheduler.from_config({"num_train_timesteps": 1000})


def test_a_run_from_the_middle_uses_the_nodes_that_are_left() -> None:
    scheduler = FewstepScheduler.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), "unipc_2")
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for begin in (True, False):
        scheduler.set_timesteps(8)
        assert scheduler.timesteps[0] == pytest.approx(1000 * T_MAX)
        if begin:
            scheduler.set_begin_index(5)
        state = x
        for k, t in enumerate(scheduler.timesteps[5:]):
            state = scheduler.step(state - 0.3, t, state, return_dict=False)[0]
            assert scheduler.step_index == 6 + k
        results.append(state)
    assert torch.equal(*results)
    noisy = scheduler.scale_noise(torch.ones(2, 4), scheduler.timesteps[5:6], torch.zeros(2, 4))
    assert torch.allclose(noisy, torch.full((2, 4), 1 - 0.375))
