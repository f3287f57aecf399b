"""fewstep: distil a many-step diffusion or flow model into a few-step generator."""

from fewstep.api import export, load, sample, sample_files, train
from fewstep.errors import UserError
from fewstep.eval.pictures import save_grid
from fewstep.make import encode, make_pairs
from fewstep.measure import compare, evaluate, report
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.store import load_model, save_model

__all__ = [
    "Condition",
    "Denoiser",
    "Guidance",
    "UserError",
    "compare",
    "encode",
    "evaluate",
    "export",
    "load",
    "load_model",
    "make_pairs",
    "report",
    "sample",
    "sample_files",
    "save_grid",
    "save_model",
    "train",
]
