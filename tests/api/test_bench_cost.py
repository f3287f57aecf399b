"""The cost of the loop is compared with evaluations in the precision of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from worlds import tiny_config, tiny_teacher

from fewstep.api.bench_cost import bench_sampler, bench_step
from fewstep.distill.config_files import parse_config
from fewstep.models.loading import load_model
from fewstep.samplers.plan import SamplingConfig


def types_of_convolutions(work: object) -> set[torch.dtype]:
    found: set[torch.dtype] = set()

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(output, torch.Tensor):
            found.add(output.dtype)

    hook = register_module_forward_hook(record)
    try:
        work()  # type: ignore[operator]
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_bare_evaluations_compute_in_the_precision_of_the_run(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = parse_config(tiny_config(tmp_path, precision=precision, device="cpu"), "test")
    assert types_of_convolutions(lambda: bench_step(config, 2)) == {dtype}
    model = load_model(tiny_teacher(tmp_path / "other"))
    model.denoiser.precision = dtype
    assert types_of_convolutions(lambda: bench_sampler(model, SamplingConfig("euler", 2), 4, 2)) == {dtype}
