"""Runs of which the memory is planned in tests."""

from __future__ import annotations

from typing import Any

from fewstep.core.files import read_tensors
from fewstep.distill.config import Config
from fewstep.models.live_memory import EvaluationMemory
from fewstep.models.loading import BUNDLED

GiB = 2**30
FASHION = sum(t.nbytes for t in read_tensors(BUNDLED / "fashion/model.safetensors").values())  # in float32


def config(**changes: Any) -> Config:
    stage = {
        "steps": 4, "objective": {"name": "tdm", "steps": 2, "critic_updates": 2},
        "roles": {"student": {"lr": 1e-5, "ema": 0.9}, "fake": {"lr": 1e-5}},
    }  # fmt: skip
    return Config.model_validate({"teacher": "fashion", "batch": 8, "device": "cpu", "stages": [stage], **changes})


def free(*_: object) -> EvaluationMemory:
    """Evaluations that need no memory."""
    return EvaluationMemory(0, 0)
