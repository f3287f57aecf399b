"""Conversion between fewstep's solvers and diffusers' schedulers, in both directions. Needs the extra ``diffusers``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.family import noise_process
from fewstep.models.prediction import Kind
from fewstep.models.schedules import RectifiedFlow
from fewstep.samplers.dpm_solver_pp import pp_steps
from fewstep.samplers.grids import T_MAX, Spacing, check_times, grid
from fewstep.samplers.multistep import MultistepState, Step
from fewstep.samplers.predictor import ModelOutput, Predictor
from fewstep.samplers.solvers import Rule
from fewstep.samplers.unipc import unipc_steps

RULES: dict[str, Callable[[int], list[Step]]] = {
    "dpmpp_2m": pp_steps,
    "dpmpp_3m": partial(pp_steps, order=3),
    "dpmpp_3m_exact": partial(pp_steps, order=3, relaxation="none"),
    "unipc_2": unipc_steps,
    "unipc_3": partial(unipc_steps, order=3),
}


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """A multistep rule as a scheduler: ``pipeline.scheduler = FewstepScheduler.from_scheduler(pipeline.scheduler)``.

    ``source`` is the config of the scheduler whose noise schedule and prediction type it adopts. Coefficients are
    float64 numbers; timesteps are not rounded.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, source: dict[str, Any], rule: str = "unipc_2", spacing: str = "time") -> None:
        if rule not in RULES:
            raise UserError(f"Unknown rule {rule!r}{nearest(rule, RULES)}.")
        process = noise_process(source)
        self._predict = Predictor(Denoiser(torch.nn.Identity(), process.schedule, process.kind), Condition())
        self._rule, self._spacing = rule, spacing
        self._flow, self._shift = isinstance(process.schedule, RectifiedFlow), process.shift
        self._train_timesteps = int(source.get("num_train_timesteps", 1000))
        self.timesteps = torch.zeros(0)
        self.init_noise_sigma = 1.0

    @staticmethod
    def from_scheduler(scheduler: Any, rule: str = "unipc_2", spacing: str = "time") -> FewstepScheduler:
        """A scheduler with another one's settings. Raises ``UserError`` on an unknown rule or noise schedule."""
        settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        ours: FewstepScheduler = FewstepScheduler(settings | {"_class_name": type(scheduler).__name__}, rule, spacing)
        return ours

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        """N steps in the spacing, or (flows only) one step from each of ``sigmas``, which are before the shift."""
        schedule, shift = self._predict.schedule, self._shift if mu is None else float(torch.tensor(mu).exp())
        if sigmas is not None:
            times = check_times([min(shift * s / (1 + (shift - 1) * s), T_MAX) for s in sigmas] + [0.0])
        else:
            spacing = cast(Spacing, self._spacing)
            t_max = T_MAX if self._flow else 1.0
            times = grid(schedule, int(num_inference_steps or 0), spacing, factor=shift, t_max=t_max)
        nodes = self._predict.nodes(times)
        self._solver = MultistepState(nodes, RULES[self._rule](len(nodes) - 1))
        timesteps = [1000 * n.t if self._flow else max(0.0, 1000 * n.t - 1) for n in nodes[:-1]]
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([n.sigma for n in nodes])
        self.num_inference_steps = len(timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SimpleNamespace | tuple[Tensor]:
        """The state predicted for the next node. Call it once per timestep, in order."""
        kind, scalars = self._predict.denoiser.kind, self._predict.scalars(self._solver.node.t)
        output = ModelOutput(sample.float(), model_output.float(), kind, scalars)
        following = self._solver.step(sample.float(), output)[1].to(sample.dtype)
        return SimpleNamespace(prev_sample=following) if return_dict else (following,)

    def __len__(self) -> int:
        return self._train_timesteps


def solver_from_diffusers(scheduler: Any) -> Rule:
    """A rule that takes its steps with a diffusers scheduler, on the scheduler's own grid of ``len(times) - 1`` steps.
    As for every rule, ``x`` is noise of the level of ``times[0]``. Wrap it in a ``Solver`` to register it."""
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    flow = isinstance(noise_process(config).schedule, RectifiedFlow)
    kinds: dict[str, Kind] = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}
    kind: Kind = "velocity" if flow else kinds[config.get("prediction_type", "epsilon")]

    def rule(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
        scheduler.set_timesteps(len(times) - 1)
        initial_sigma = 1.0 if flow else float(scheduler.init_noise_sigma)
        x = x / predict.nodes(times)[0].sigma * initial_sigma
        for timestep in scheduler.timesteps:
            t = float(timestep) / 1000 if flow else (float(timestep) + 1) / 1000
            scaled = x if flow else scheduler.scale_model_input(x, timestep)
            output = predict(scaled, min(t, 1.0)).view(kind)
            x = scheduler.step(output.to(x.dtype), timestep, x, return_dict=False)[0]
        return x

    return rule
