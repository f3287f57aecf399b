"""diffusers' schedulers as solvers. Needs the extra ``diffusers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.models.hub.noise_process import noise_process
from fewstep.models.schedules import RectifiedFlow
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import Rule

SUPPORTED = (
    "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip


def solver_from_diffusers(scheduler: Any) -> Rule:
    """A rule that takes its steps with a diffusers scheduler, on the scheduler's own grid of ``len(times) - 1`` steps.
    As for every rule, ``x`` is noise of the level of ``times[0]``. Wrap it in a ``Solver`` to register it.

    Raises ``UserError`` on a scheduler that adds noise, whose random numbers no seed of fewstep controls, and on every
    class that is not known to work.
    """
    name, config = type(scheduler).__name__, dict(scheduler.config)
    if name not in SUPPORTED:
        raise UserError(f"A {name} does not work as a solver{nearest(name, SUPPORTED)}.")
    if config.get("stochastic_sampling") or str(config.get("algorithm_type")).startswith("sde"):
        raise UserError(f"This {name} adds noise, which a solver from diffusers cannot: use ddpm or sde_dpmpp_2m.")
    if config.get("use_dynamic_shifting"):
        raise UserError(f"This {name} shifts by resolution: set use_dynamic_shifting to False and a shift.")
    process = noise_process(config | {"_class_name": name})
    flow, kind = isinstance(process.schedule, RectifiedFlow), process.kind
    steps_trained, offset = int(config["num_train_timesteps"]), 0 if flow else 1

    def rule(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
        scheduler.set_timesteps(len(times) - 1)
        x = x / predict.nodes(times)[0].sigma * (1.0 if flow else float(scheduler.init_noise_sigma))
        for timestep in scheduler.timesteps:
            t = (float(timestep) + offset) / steps_trained
            scaled = x if flow else scheduler.scale_model_input(x, timestep)
            output = predict(scaled, min(t, 1.0)).view(kind)
            x = scheduler.step(output.to(x.dtype), timestep, x).prev_sample
        return x

    return rule
