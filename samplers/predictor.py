"""A denoiser bound to its condition and guidance: what a sampler calls, and what counts its network evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import OFF, Guidance, guide
from fewstep.models.prediction import Prediction
from fewstep.models.schedules import NoiseSchedule


@dataclass
class Predictor:
    """``predictor(x, t) -> Prediction``; ``nfe`` counts evaluations a sample, two for a guided one."""

    denoiser: Denoiser
    condition: Condition
    guidance: Guidance = OFF
    nfe: int = field(default=0, init=False)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: float) -> Prediction:
        guided = guide(self.denoiser, x, t, self.condition, self.guidance)
        self.nfe += 1 if guided.null is None else 2
        return guided.out
