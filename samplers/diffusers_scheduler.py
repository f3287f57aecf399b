"""fewstep's multistep rules as a scheduler for diffusers pipelines. Needs the extra ``diffusers``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.noise_process import noise_process
from fewstep.models.schedules import RectifiedFlow, shift
from fewstep.samplers.dpm_solver_pp import pp_steps
from fewstep.samplers.grids import SPACINGS, T_MAX, check_times, grid_of, respace
from fewstep.samplers.multistep import MultistepState, Step
from fewstep.samplers.predictor import ModelOutput, Predictor
from fewstep.samplers.unipc import unipc_steps

RULES: dict[str, Callable[[int], list[Step]]] = {
    "ddim": partial(pp_steps, order=1),
    "dpmpp_2m": pp_steps,
    "dpmpp_3m": partial(pp_steps, order=3),
    "dpmpp_3m_exact": partial(pp_steps, order=3, relaxation="none"),
    "unipc_2": unipc_steps,
    "unipc_3": partial(unipc_steps, order=3),
}
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
SPACING_FLAGS = {
    "use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log_snr",
}  # fmt: skip
REFUSED: dict[str, tuple[Any, ...]] = {  # the values with which a setting of the source has no effect
    "stochastic_sampling": (False, None),
    "final_sigmas_type": ("zero", None),
    "interpolation_type": ("linear", None),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "time_shift_type": ("exponential", "linear", None),
}


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """A multistep rule as a scheduler: ``pipeline.scheduler = FewstepScheduler.from_scheduler(pipeline.scheduler)``.

    ``source`` are the settings of the scheduler that it replaces, whose class is ``source_class``. It adopts the noise
    schedule, the prediction type, static or dynamic shift, ``shift_terminal`` and the clipping or thresholding of x0,
    and replaces the rule and the grid: ``spacing`` is a grid as in ``grids.grid_of``; without one, it is the source's
    karras, exponential, beta or log-SNR spacing, or else uniform in time (a timestep spacing of "trailing"). Other
    settings that would have an effect are refused. Coefficients are float64 numbers; timesteps are not rounded.

    The config contains the source's settings, so that pipelines find them, and schedulers can be exchanged in turn.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self, rule: str = "unipc_2", spacing: str | None = None, source_class: str | None = None, **source: Any
    ) -> None:
        if rule not in RULES:
            raise UserError(f"A scheduler takes fewstep's multistep rules, not {rule!r}{nearest(rule, RULES)}.")
        if spacing is not None and spacing.partition(":")[0] not in SPACINGS:
            raise UserError(f"Unknown grid {spacing!r}{nearest(spacing, SPACINGS)}.")
        name = source_class or _source_class(source)
        if name in DISTILLED:
            raise UserError(f"A {name} belongs to a few-step student, to which the rule {rule!r} does not apply.")
        for key, allowed in REFUSED.items():
            if source.get(key) not in allowed:
                raise UserError(f"{key} {source[key]!r} of the {name} is not supported by fewstep's rules.")
        process = noise_process(source | {"_class_name": name})
        self.register_to_config(rule=rule, spacing=spacing, source_class=name, **source)
        self._predict = Predictor(Denoiser(torch.nn.Identity(), process.schedule, process.kind), Condition())
        self._flow, self._shift = isinstance(process.schedule, RectifiedFlow), process.shift
        self._train_timesteps = int(source.get("num_train_timesteps", 1000))
        self._source: dict[str, Any] = source
        self.timesteps, self.sigmas = torch.zeros(0), torch.zeros(0)
        self._begin_index: int | None = None
        self._start, self._run = 0, None  # type: int, MultistepState | None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: Any = False, **kwargs: Any) -> Any:
        """A scheduler from its own config or from that of the diffusers scheduler that it replaces; ``kwargs`` replace
        settings. Raises ``UserError`` on an unknown rule or noise schedule and on unsupported settings."""
        name = config.get("source_class") or config.get("_class_name")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        ours = cls(**settings | {"source_class": name} | kwargs)
        return (ours, {}) if return_unused_kwargs else ours

    @classmethod
    def from_scheduler(cls, scheduler: Any, rule: str | None = None, spacing: str | None = None) -> FewstepScheduler:
        """A scheduler in place of another. ``rule`` and ``spacing`` are by default those of a ``FewstepScheduler``, or
        else ``unipc_2`` and the source's spacing. Raises ``UserError`` as ``from_config`` does."""
        given: dict[str, Any] = {"rule": rule, "spacing": spacing}
        changes = {key: value for key, value in given.items() if value is not None}
        config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
        ours: FewstepScheduler = cls.from_config(config, **changes)
        return ours

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None,
        mu: float | None = None, timesteps: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """N steps in the spacing, or one step from each given noise level: for a flow, ``sigmas`` before the shift (by
        ``mu`` if the source shifts dynamically); otherwise ``sigmas`` as sigma / alpha, or ``timesteps``."""
        if num_inference_steps is not None and not isinstance(num_inference_steps, int):
            raise UserError(f"The number of steps must be an integer, got {num_inference_steps!r}.")
        if (num_inference_steps or 0) < 1 and (sigmas is None) == (timesteps is None):
            raise UserError("set_timesteps takes a number of steps, sigmas or timesteps.")
        try:
            if self._flow:
                times = self._flow_times(num_inference_steps, sigmas, timesteps, mu)
            else:
                times = self._discrete_times(num_inference_steps, sigmas, timesteps)
        except ValueError as error:
            raise UserError(f"These timesteps do not work: {error}.") from error
        self._nodes = self._predict.nodes(times)
        scale, offset = self._train_timesteps, 0 if self._flow else 1
        values = [max(0.0, scale * node.t - offset) for node in self._nodes[:-1]]
        self.timesteps = torch.tensor(values, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([node.sigma for node in self._nodes])
        self.num_inference_steps = len(values)
        self._begin_index, self._run = None, None

    def _flow_times(
        self, steps: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> tuple[float, ...]:
        if timesteps is not None:
            raise UserError("A flow's scheduler takes sigmas (noise levels before the shift), not timesteps.")
        factor = self._shift_factor(mu)
        n = int(steps or 0) if sigmas is None else len(sigmas)
        uniform = [1 - k / n for k in range(n)]
        if self.config["spacing"] not in (None, "time"):
            if sigmas is not None and not torch.allclose(torch.tensor(sigmas), torch.tensor(uniform), atol=1e-4):
                raise UserError(f"Sigmas are given, so the spacing {self.config['spacing']!r} has no effect: drop one.")
            times = grid_of(RectifiedFlow(), n, self.config["spacing"], factor=factor)
            levels = torch.tensor(times[:-1], dtype=torch.float64)
        else:
            given = uniform if sigmas is None else [float(sigma) for sigma in sigmas]
            levels = shift(torch.tensor(given, dtype=torch.float64), factor)
        if (terminal := self._source.get("shift_terminal")) and len(levels) > 1:  # one step starts at 1
            levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
        if self.config["spacing"] is None and (flag := self._spacing_flag()) and len(levels) > 1:
            levels = respace(levels, flag)  # as FlowMatchEulerDiscreteScheduler does, over sigma
        t_max = 1.0 if self.config["rule"] == "ddim" else T_MAX
        return check_times([min(levels[0].item(), t_max), *levels[1:].tolist(), 0.0])

    def _shift_factor(self, mu: float | None) -> float:
        """The factor of the time shift; without dynamic shifting, ``mu`` has no effect, as in diffusers."""
        if not self._source.get("use_dynamic_shifting"):
            return self._shift
        if mu is None:
            raise UserError("This scheduler shifts by resolution: set_timesteps needs mu.")
        return float(mu) if self._source.get("time_shift_type") == "linear" else math.exp(mu)

    def _discrete_times(
        self, steps: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
    ) -> tuple[float, ...]:
        schedule = self._predict.schedule
        if timesteps is not None:
            return check_times([*(self._times_of(timesteps).tolist()), 0.0])
        if sigmas is not None:
            levels = torch.tensor([float(sigma) for sigma in sigmas if sigma], dtype=torch.float64)
            return check_times([*schedule.time_of_log_snr(-levels.log()).clamp(max=1.0).tolist(), 0.0])
        return grid_of(schedule, int(steps or 0), self.config["spacing"] or self._spacing_flag() or "time")

    def _spacing_flag(self) -> str | None:
        return next((name for flag, name in SPACING_FLAGS.items() if self._source.get(flag)), None)

    def _times_of(self, timesteps: Any) -> Tensor:
        values = torch.as_tensor(timesteps).detach().to("cpu", torch.float64).reshape(-1)
        return (values + (0 if self._flow else 1)) / self._train_timesteps

    @property
    def begin_index(self) -> int | None:
        """The index of the first timestep, if the pipeline set one."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The index of the next timestep; None before the first step."""
        return None if self._run is None else self._start + self._run.index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts a run at a later timestep, as image-to-image pipelines do."""
        self._begin_index, self._run = begin_index, None

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index of the nearest timestep."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return int((timesteps - float(timestep)).abs().argmin())

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample``: the model's input is not scaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """The noisy samples at ``timesteps``, a number or [B]."""
        times = self._times_of(timesteps)
        levels = (self._predict.schedule.alpha(times), self._predict.schedule.sigma(times))
        alpha, sigma = (value.reshape(-1, *[1] * (original_samples.ndim - 1)).to(original_samples) for value in levels)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """``add_noise``, as flow schedulers call it."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SimpleNamespace | tuple[Tensor]:
        """The state predicted for the next node. Call it once per timestep, in order; a run starts at the begin index,
        or at ``timestep``."""
        if model_output.shape != sample.shape:
            raise UserError(
                f"The model's output has shape {list(model_output.shape)} and the sample {list(sample.shape)}: "
                "a predicted variance must be removed first."
            )
        if self._run is None:
            begin = self._begin_index
            self._start = self.index_for_timestep(timestep) if begin is None else begin
            nodes = self._nodes[self._start :]
            self._run = MultistepState(nodes, RULES[self.config["rule"]](len(nodes) - 1))
        if self._run.done:
            raise UserError("All timesteps have been used: call set_timesteps before another run.")
        kind, scalars = self._predict.denoiser.kind, self._predict.scalars(self._run.node.t)
        output = self._limited(ModelOutput(sample.float(), model_output.float(), kind, scalars))
        following = self._run.step(sample.float(), output)[1].to(sample.dtype)
        return SimpleNamespace(prev_sample=following) if return_dict else (following,)

    def _limited(self, output: ModelOutput) -> ModelOutput:
        """The output with the source's dynamic thresholding or clipping of x0."""
        if self._source.get("thresholding"):
            quantile, largest = self._source["dynamic_thresholding_ratio"], self._source["sample_max_value"]
            limit = torch.quantile(output.x0.flatten(1).abs(), quantile, dim=1).clamp(1, max(1, largest))
            limit = limit.reshape(-1, *[1] * (output.x.ndim - 1))
            x0 = output.x0.clamp(-limit, limit) / limit
        elif self._source.get("clip_sample"):
            limit = self._source.get("clip_sample_range", 1.0)
            x0 = output.x0.clamp(-limit, limit)
        else:
            return output
        return ModelOutput(output.x, x0, "x0", output.scalars)

    def __len__(self) -> int:
        return self._train_timesteps


def _source_class(settings: Mapping[str, Any]) -> str:
    """The class of a config without a class name, as schedulers created in Python have: a flow's, or a discrete one."""
    if "beta_start" in settings:
        return "DDIMScheduler"
    if "shift" in settings:
        return "FlowMatchEulerDiscreteScheduler"
    raise UserError("The config has neither a class name nor betas nor a shift: use FewstepScheduler.from_scheduler.")
