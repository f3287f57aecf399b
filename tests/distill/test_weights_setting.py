"""The setting ``weights`` acts or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config


def test_weights_of_a_model_that_is_no_pipeline_are_not_changed_without_a_word(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path, weights="bfloat16"), "test")
    with pytest.raises(UserError, match="weights: bfloat16 does not act"):
        build_inputs(config, torch.device("cpu"))
