"""Every objective through the full pipeline: config, a few steps, a student on disk, samples from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import settings
from torch import Tensor

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.objectives import OBJECTIVES
from fewstep.eval.references import load_reference
from fewstep.eval.validation import Validation
from fewstep.models.loading import load_model
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform
from fewstep.samplers.plan import SamplingConfig


def trained(raw: dict[str, Any]) -> tuple[Path, list[dict[str, float]]]:
    run = fewstep.train(parse_config(raw, "test"))
    return run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", OBJECTIVES.names())
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_objective_trains_a_student_that_samples(objective: str, precision: str, tmp_path: Path) -> None:
    run, lines = trained(settings(objective, tmp_path, "cpu", precision))
    student = load_model(run / "student")
    assert len(lines) == 3
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in lines)
    assert {p.dtype for p in student.denoiser.parameters()} == {torch.float32}, "only the evaluations are in bfloat16"
    steps = 2 if student.config.few_step is None else None
    images = fewstep.sample(run, n=20, sampling=fewstep.SamplingConfig(steps=steps), device="cpu")
    assert images.shape == (20, 1, 8, 8)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_dmd2_with_its_gan_term(features: str, tmp_path: Path) -> None:
    raw = settings("dmd2", tmp_path, "cpu", "float32", critic_updates=1, gan={"features": features})
    run, lines = trained(raw)
    assert all({"loss/gan", "loss/discriminator", "loss/match", "loss/critic"} <= set(line) for line in lines)
    assert fewstep.sample(run, n=4, device="cpu").shape == (4, 1, 8, 8)
    raw["data"] = {"kind": "labels"}
    with pytest.raises(UserError, match="use real images"):
        trained(raw | {"out": str(tmp_path / "none")})


def test_an_objective_that_needs_images_is_refused_on_labels(tmp_path: Path) -> None:
    raw = settings("flow_matching", tmp_path, "cpu", "float32") | {"data": {"kind": "labels"}}
    with pytest.raises(UserError, match=r"needs \['x0'\] with each condition, and data.kind=labels provides none"):
        trained(raw)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_bfloat16_changes_the_losses_only_by_rounding(objective: str, tmp_path: Path) -> None:
    full, half = (
        trained(settings(objective, tmp_path, "cpu", precision) | {"out": str(tmp_path / precision)})[1]
        for precision in ("float32", "bfloat16")
    )
    losses = [name for name in full[0] if name.startswith("loss/")]
    assert losses
    for name in losses:
        assert half[0][name] == pytest.approx(full[0][name], rel=0.05)
        assert [line.get(name) for line in half] != [line.get(name) for line in full]


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_a_gpu_computes_the_losses_of_the_cpu(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_host(self: KeyedRandom, shape: tuple[int, ...], stream: str = "noise") -> Tensor:
        return torch.randn(shape, generator=self._generator(stream, torch.device("cpu"))).to(self.device)

    monkeypatch.setattr(KeyedRandom, "normal", on_the_host)  # a GPU generates other numbers
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds float32 to 10 bits in convolutions
    cpu, gpu = (
        trained(settings(objective, tmp_path, device, "float32") | {"out": str(tmp_path / device)})[1]
        for device in ("cpu", "cuda")
    )
    for a, b in zip(cpu, gpu, strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/"))):
            assert b[name] == pytest.approx(a[name], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "n", "least", "share"), [("fashion", 48, 500, 3.5, 0.5), ("emoji", 80, 128, 4.0, 0.75)]
)
def test_the_demo_configs_distil_the_bundled_teachers(
    name: str, steps: int, n: int, least: float, share: float, tmp_path: Path
) -> None:
    """A few ``steps`` of each demo with a small batch, scored on ``n`` images with 4 evaluations per sample.

    The student starts as the teacher with 4 evaluations, unguided; that of fashion needs more than 8 to reach 1.5.
    """
    changes = [f"stages.0.steps={steps}", "batch=16", f"validation.n={n}", f"validation.every={steps}"]
    changes += ["health.every=0", f"out={tmp_path / 'run'}", "device=cpu"]
    config = load_config(f"configs/{name}/demo.yaml", changes)
    teacher, rule = load_model(name), FewStep(times=time_uniform(4)[:-1], rule="deterministic")
    validate = Validation(SamplingConfig("student"), n, load_reference(name, "train"), tmp_path)
    before = validate(teacher.denoiser, teacher.config.model_copy(update={"few_step": rule}), 0)
    run = fewstep.train(config)
    after = [line["validation"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "validation" in line]
    assert before > least
    assert after[-1] < share * before
