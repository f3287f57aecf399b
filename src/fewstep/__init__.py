"""fewstep: distil a many-step diffusion or flow model into a few-step generator.

The names below are imported when they are first used, so that ``import fewstep`` alone loads neither torch nor anything
else that is slow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.api.data import encode as encode
    from fewstep.api.evaluate import evaluate as evaluate
    from fewstep.api.export import export as export
    from fewstep.api.models import load as load
    from fewstep.api.reference import make_reference as make_reference
    from fewstep.api.report import report as report
    from fewstep.api.sample import sample as sample
    from fewstep.api.sample import sample_files as sample_files
    from fewstep.api.train import train as train
    from fewstep.core.errors import UserError as UserError
    from fewstep.core.image_grid import save_grid as save_grid
    from fewstep.core.registry import register as register
    from fewstep.distill.callback import Callback as Callback
    from fewstep.distill.config import Config as Config
    from fewstep.distill.trainer import Trainer as Trainer
    from fewstep.models.condition import Condition as Condition
    from fewstep.models.denoiser import Denoiser as Denoiser
    from fewstep.models.guidance import Guidance as Guidance
    from fewstep.models.hub.student_pipeline import load_pipeline as load_pipeline
    from fewstep.models.loading import Model as Model
    from fewstep.models.model_config import ModelConfig as ModelConfig
    from fewstep.models.saving import save_model as save_model
    from fewstep.samplers.plan import SamplingConfig as SamplingConfig

_MODULES = {
    "Callback": "distill.callback", "Condition": "models.condition", "Config": "distill.config",
    "Denoiser": "models.denoiser", "Guidance": "models.guidance", "Model": "models.loading",
    "ModelConfig": "models.model_config", "SamplingConfig": "samplers.plan", "Trainer": "distill.trainer",
    "UserError": "core.errors", "encode": "api.data", "evaluate": "api.evaluate", "export": "api.export",
    "load": "api.models", "load_pipeline": "models.hub.student_pipeline",
    "make_reference": "api.reference", "register": "core.registry", "report": "api.report", "sample": "api.sample",
    "sample_files": "api.sample", "save_grid": "core.image_grid", "save_model": "models.saving", "train": "api.train",
}  # fmt: skip
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"fewstep.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
