"""The noise process of a pipeline: a closed list of scheduler classes, equal to diffusers' own numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.models.hub.noise_process import DISCRETE, FLOW, noise_process
from fewstep.models.loading import load_model
from fewstep.models.schedules import RectifiedFlow, VPDiscrete

diffusers = pytest.importorskip("diffusers")
EVERY = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith(("Flax", "KarrasVe"))
)


def config(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def signal(process: Any) -> torch.Tensor:
    """The cumulative product of alphas at every timestep."""
    assert isinstance(process.schedule, VPDiscrete)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return process.schedule.alpha(t).square()


@pytest.mark.parametrize("settings", [{}, {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": "scaled_linear"}])
@pytest.mark.parametrize("name", sorted(DISCRETE))
def test_a_discrete_schedule_is_that_of_the_scheduler(name: str, settings: dict[str, Any]) -> None:
    """Also where the config omits settings, which then have the defaults of the class."""
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(**settings)
    for given in (config(scheduler), {"_class_name": name, **settings}):
        torch.testing.assert_close(
            signal(noise_process(given)), scheduler.alphas_cumprod.double().cpu(), rtol=2e-4, atol=1e-7
        )


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_snr_shift_of_cogvideox_is_part_of_the_noise_process(scale: float) -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=scale, prediction_type="v_prediction")
    process = noise_process(config(scheduler))
    assert process.kind == "v"
    torch.testing.assert_close(signal(process), scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in (*DISCRETE, *FLOW)])
def test_every_other_scheduler_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.* is not supported; supported: CogVideoXDDIMScheduler, "):
        noise_process({"_class_name": name})


@pytest.mark.parametrize("name", FLOW)
def test_flow_schedulers_are_rectified_flows_with_their_static_shift(name: str) -> None:
    process = noise_process(config(getattr(diffusers, name)(shift=3.0)))
    assert (process.schedule, process.kind, process.shift) == (RectifiedFlow(), "velocity", 3.0)


def test_a_solver_with_flow_sigmas_is_a_rectified_flow() -> None:
    solver = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0, shift_terminal=None
    )
    assert noise_process(config(solver)) == (RectifiedFlow(), "velocity", 5.0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas True"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "prediction_type 'epsilo"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2'"),
    ],
)
def test_settings_with_another_meaning_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*{name} is not supported|{message} of the {name}"):
        noise_process({"_class_name": name, **settings})


def with_scheduler(source: Path, out: Path, **scheduler: Any) -> Path:
    shutil.copytree(source, out)
    file = out / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return out


def test_an_sdxl_folder_with_edm_preconditioning_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Playground v2.5: loaded as a discrete schedule it would be sampled at wrong timesteps."""
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    playground = with_scheduler(saved("sdxl"), tmp_path / "playground", **config(scheduler))
    with pytest.raises(UserError, match=r"playground.*EDMDPMSolverMultistepScheduler.*replace the scheduler"):
        load_model(playground)


def test_another_number_of_training_timesteps_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="500 training timesteps"):
        load_model(with_scheduler(saved("sd"), tmp_path / "short", num_train_timesteps=500))
