"""The noise process of a pipeline, from the config of its diffusers scheduler.

The list of scheduler classes is closed: a class that is not in it may give its timesteps or outputs another meaning
(EDM preconditioning in Playground v2.5, inverted times), which no setting reveals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.models.prediction import Kind
from fewstep.models.schedules import NoiseSchedule, RectifiedFlow, VPDiscrete

Settings = Mapping[str, Any]
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_DDPM = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_KARRAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DISCRETE: dict[str, dict[str, Any]] = {  # with the defaults of the class, for settings that a config omits
    **dict.fromkeys(
        (
            "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
            "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
            "SASolverScheduler", "UniPCMultistepScheduler",
        ),
        _DDPM,
    ),
    **dict.fromkeys(
        (
            "DPMSolverSDEScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
        ),
        _KARRAS,
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), _LATENT),
    **dict.fromkeys(("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"), _LATENT | {"snr_shift_scale": 3.0}),
}  # fmt: skip
KINDS: dict[str, Kind] = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}


class NoiseProcess(NamedTuple):
    """The noise schedule of a pipeline, what its network predicts, and the shift of its time grid."""

    schedule: NoiseSchedule
    kind: Kind
    shift: float


def noise_process(scheduler: Settings) -> NoiseProcess:
    """The noise process that the network was trained with, from a scheduler's config; its sampling rule is ignored.

    Raises ``UserError`` on classes and settings that are not supported.
    """
    name = str(scheduler.get("_class_name"))
    if name not in (*FLOW, *DISCRETE):
        known = ", ".join(sorted((*FLOW, *DISCRETE)))
        raise UserError(
            f"The scheduler is a {name}, whose noise process is not supported; supported: {known}. "
            "If the network was trained as one of these describes, replace the scheduler in the pipeline's folder."
        )
    if name in FLOW or scheduler.get("use_flow_sigmas"):
        if name not in FLOW:
            _require(name, scheduler, "prediction_type", ("flow_prediction",))
        _require(name, scheduler, "invert_sigmas", (False, None))
        static = scheduler.get("shift" if name in FLOW else "flow_shift", 1.0)
        shift = 1.0 if scheduler.get("use_dynamic_shifting") else float(static)
        return NoiseProcess(RectifiedFlow(), "velocity", shift)
    _require(name, scheduler, "prediction_type", (*KINDS, None))
    _require(name, scheduler, "timestep_type", ("discrete", None))  # continuous: EDM's (Stable Video Diffusion)
    kind = KINDS[scheduler.get("prediction_type") or "epsilon"]
    return NoiseProcess(VPDiscrete(tuple(_betas(name, scheduler).tolist())), kind, 1.0)


def beta_settings(scheduler: Settings) -> dict[str, Any]:
    """The settings of the betas of a discrete scheduler, as arguments of diffusers' schedulers."""
    defaults = DISCRETE[str(scheduler["_class_name"])] | {"num_train_timesteps": 1000, "trained_betas": None}
    return {name: scheduler.get(name, default) for name, default in defaults.items()}


def _require(name: str, scheduler: Settings, key: str, supported: tuple[Any, ...]) -> None:
    value = scheduler.get(key)
    if value not in supported:
        known = ", ".join(str(one) for one in supported if one is not None)
        raise UserError(f"{key} {value!r} of the {name} is not supported; supported: {known}.")


def _betas(name: str, scheduler: Settings) -> Tensor:
    settings = beta_settings(scheduler)
    start, end, steps = (settings[key] for key in ("beta_start", "beta_end", "num_train_timesteps"))
    if settings["trained_betas"] is not None:
        betas = torch.tensor(settings["trained_betas"], dtype=torch.float64)
    elif settings["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        _require(name, settings, "beta_schedule", ("linear", "scaled_linear"))
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"rescale_betas_zero_snr of the {name} is not supported: x0 is undefined at pure noise.")
    return _shift_snr(betas, settings["snr_shift_scale"]) if "snr_shift_scale" in settings else betas


def _shift_snr(betas: Tensor, scale: float) -> Tensor:
    """The betas whose signal-to-noise ratios are those of ``betas`` divided by ``scale`` (CogVideoX, arXiv 2408.06072,
    after Lin et al., arXiv 2305.08891)."""
    signal = (1 - betas).cumprod(0)
    shifted = signal / (scale + (1 - scale) * signal)
    return 1 - shifted / torch.cat([shifted.new_ones(1), shifted[:-1]])
