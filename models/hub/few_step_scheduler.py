"""A diffusers scheduler for a student: the times of a pipeline's default call must be exactly the student's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fewstep.core.errors import UserError
from fewstep.models.hub.folder import PipelineFolder, require_diffusers
from fewstep.models.hub.noise_process import beta_settings
from fewstep.models.model_config import FewStep
from fewstep.models.schedules import VPDiscrete

TOLERANCE = 1e-5  # of a time: float32 in the scheduler
TRAIN_STEPS = 1000


def scheduler_for(folder: PipelineFolder, few_step: FewStep) -> Any:
    """A scheduler of diffusers with which the pipeline's call, at the student's number of steps, evaluates the student
    at its times and follows its rule. Raises ``UserError`` if there is none."""
    schedule = folder.noise_process.schedule
    scheduler = _discrete(folder, few_step, schedule) if isinstance(schedule, VPDiscrete) else _flow(folder, few_step)
    times = default_times(scheduler, len(few_step.times), folder.family.passes_sigmas)
    wrong = [(t, own) for t, own in zip(times, few_step.times, strict=True) if not abs(t - own) <= TOLERANCE]
    if wrong:
        where = "between two timesteps" if isinstance(schedule, VPDiscrete) else f"at shift {few_step.shift:g}"
        raise UserError(
            f"No scheduler of diffusers samples a {folder.index['_class_name']} at the student's times "
            f"{', '.join(f'{t:.4g}' for t in few_step.times)}: {wrong[0][1]:.4g} is {where} and would become "
            f"{wrong[0][0]:.4g}. Train with another number of steps"
            + (", one that divides 1000, and shift: 1." if isinstance(schedule, VPDiscrete) else " or another shift.")
        )
    return scheduler


def default_times(scheduler: Any, steps: int, passes_sigmas: bool) -> list[float]:
    """The times at which a pipeline's default call with this scheduler evaluates the network."""
    if passes_sigmas:
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    discrete = "beta_start" in scheduler.config
    return [(float(t) + discrete) / TRAIN_STEPS for t in scheduler.timesteps]


def _discrete(folder: PipelineFolder, few_step: FewStep, schedule: VPDiscrete) -> Any:
    diffusers, own = require_diffusers(), folder.scheduler_config
    settings = beta_settings(own) | {"prediction_type": own.get("prediction_type", "epsilon"), "clip_sample": False}
    if settings.pop("snr_shift_scale", 1.0) != 1.0:
        settings["trained_betas"] = list(schedule.betas)
    if few_step.rule == "renoise":
        return diffusers.LCMScheduler(**settings, original_inference_steps=TRAIN_STEPS)
    return diffusers.DDIMScheduler(**settings, timestep_spacing="trailing", steps_offset=1)


def _flow(folder: PipelineFolder, few_step: FewStep) -> Any:
    diffusers, steps = require_diffusers(), len(few_step.times)
    renoise = few_step.rule == "renoise"
    make = diffusers.FlowMatchLCMScheduler if renoise else diffusers.FlowMatchEulerDiscreteScheduler
    if folder.family.passes_sigmas or steps == 1:
        return make(shift=few_step.shift)
    return make(shift=_stretched_shift(steps, few_step.shift), shift_terminal=few_step.times[-1])


def _stretched_shift(steps: int, shift: float) -> float:
    """The scheduler's shift s with which its own grid, stretched to the last time, is the uniform grid with ``shift``.

    Its own n times are those of u = 1 - k d with shift s, where d = (1 - m) / (n - 1) and m = s / (999 + s) is its
    smallest time. With S = ``shift``, the wanted 1 - t is k / (n S - (S - 1) k) and the scheduler's is proportional to
    k / (s / d - (s - 1) k), so that s / (d (s - 1)) = n S / (S - 1): a quadratic equation in s.
    """
    if shift == 1:
        return 1.0
    ratio = steps * shift / ((shift - 1) * (steps - 1))
    a, b, c = 1 / (TRAIN_STEPS - 1), 1 - ratio, ratio
    discriminant = b * b - 4 * a * c
    return 2 * c / (-b + math.copysign(math.sqrt(discriminant), c)) if discriminant >= 0 else shift


def step_changes(times: Sequence[float], experts: Sequence[int]) -> dict[int, int]:
    """After which steps (from 0) of a call another expert takes over, given the expert of each time; the last entry
    returns to the first expert, for the next call."""
    following = [*experts[1:], experts[0]]
    return {k: after for k, (before, after) in enumerate(zip(experts, following, strict=True)) if before != after}
