"""Between our solvers and diffusers' schedulers, both ways.

``FewstepScheduler`` lets a diffusers pipeline be sampled by one of our multistep rules; ``diffusers_rule`` makes a rule
of ours of any diffusers scheduler. Needs the extra ``diffusers``.
"""

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
from fewstep.samplers.grids import MOST, Spacing, checked, grid
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
    """A multistep rule as a diffusers scheduler: ``pipeline.scheduler = FewstepScheduler.of(pipeline.scheduler, ...)``.

    ``source`` is the config of the scheduler whose noise schedule and prediction type it takes over. Coefficients are
    float64 numbers; labels are not rounded.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, source: dict[str, Any], rule: str = "unipc_2", spacing: str = "time") -> None:
        if rule not in RULES:
            raise UserError(f"Unknown rule {rule!r}{nearest(rule, RULES)}.")
        known = noise_process(source)
        self._predict = Predictor(Denoiser(torch.nn.Identity(), known.schedule, known.kind), Condition())
        self._rule, self._spacing, self._labels = rule, spacing, int(source.get("num_train_timesteps", 1000))
        self._flow, self._shift = isinstance(known.schedule, RectifiedFlow), known.shift
        self.timesteps = torch.zeros(0)
        self.init_noise_sigma = 1.0

    @staticmethod
    def of(scheduler: Any, rule: str = "unipc_2", spacing: str = "time") -> FewstepScheduler:
        """From another scheduler. Raises ``UserError`` on an unknown rule or noise schedule."""
        settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        made: FewstepScheduler = FewstepScheduler(settings | {"_class_name": type(scheduler).__name__}, rule, spacing)
        return made

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        """N steps of the spacing, or those that start at ``sigmas`` (of flows, before the shift)."""
        schedule, shift = self._predict.schedule, self._shift if mu is None else float(torch.tensor(mu).exp())
        if sigmas is not None:
            times = checked([min(shift * s / (1 + (shift - 1) * s), MOST) for s in sigmas] + [0.0])
        else:
            spacing = cast(Spacing, self._spacing)
            most = MOST if self._flow else 1.0
            times = grid(schedule, int(num_inference_steps or 0), spacing, factor=shift, most=most)
        nodes = self._predict.nodes(times)
        self._walk = MultistepState(nodes, RULES[self._rule](len(nodes) - 1))
        labels = [1000 * n.t if self._flow else max(0.0, 1000 * n.t - 1) for n in nodes[:-1]]
        self.timesteps = torch.tensor(labels, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([n.sigma for n in nodes])
        self.num_inference_steps = len(labels)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SimpleNamespace | tuple[Tensor]:
        """The state predicted for the next node; call it in order, once a timestep."""
        said = ModelOutput(
            sample.float(), model_output.float(), self._predict.denoiser.kind, self._predict.scalars(self._walk.node.t)
        )
        following = self._walk.step(sample.float(), said)[1].to(sample.dtype)
        return SimpleNamespace(prev_sample=following) if return_dict else (following,)

    def __len__(self) -> int:
        return self._labels


def diffusers_rule(scheduler: Any) -> Rule:
    """A rule that makes its steps with a diffusers scheduler, on that scheduler's own grid of as many steps as
    ``times`` has. ``x`` is noise of the level of ``times[0]``, as for every rule."""
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    flow = isinstance(noise_process(config).schedule, RectifiedFlow)
    kinds: dict[str, Kind] = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}

    def rule(predict: Predictor, x: Tensor, times: Sequence[float]) -> Tensor:
        scheduler.set_timesteps(len(times) - 1)
        started = 1.0 if flow else float(scheduler.init_noise_sigma)
        x = x / predict.nodes(times)[0].sigma * started
        for label in scheduler.timesteps:
            t = float(label) / 1000 if flow else (float(label) + 1) / 1000
            scaled = x if flow else scheduler.scale_model_input(x, label)
            said = predict(scaled, min(t, 1.0))
            output = said.view("velocity" if flow else kinds[config.get("prediction_type", "epsilon")])
            x = scheduler.step(output.to(x.dtype), label, x, return_dict=False)[0]
        return x

    return rule
