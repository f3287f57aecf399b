"""Teachers with two experts by noise level, as Wan 2.2 A14B: loading, adapters, students, exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import largest_difference, train_on, train_to
from tiny_pipelines import ADAPTERS, TINY, settings

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import parse_config
from fewstep.distill.memory import plan_memory
from fewstep.distill.run_folder import RunFolder
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Routed
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model
from fewstep.models.skeleton import skeleton

pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
CPU = torch.device("cpu")
BOUNDARY = 0.8  # of the tiny pipeline


def wan(saved: Saved, out: Path, adapters: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return settings(saved("wan_2_2"), "wan_2_2", out, adapters, **changes)


@pytest.mark.parametrize(("t", "part"), [(1.0, "transformer"), (BOUNDARY, "transformer"), (0.799, "transformer_2")])
def test_each_expert_denoises_its_levels(saved: Saved, t: float, part: str) -> None:
    folder = PipelineFolder.open(saved("wan_2_2"))
    x = torch.randn(2, *folder.family.shape(*TINY["wan_2_2"].size), generator=torch.Generator().manual_seed(0))
    condition = Condition(TINY["wan_2_2"].embeddings(2, 1))
    with torch.no_grad():
        ours, theirs = (
            d(x, t, condition).raw for d in (folder.denoiser(), folder.denoiser(weights=folder.path / part))
        )
    assert torch.equal(ours, theirs)


def test_the_hash_covers_both_experts(saved: Saved, tmp_path: Path) -> None:
    before = PipelineFolder.open(saved("wan_2_2")).sha256
    other = shutil.copytree(saved("wan_2_2"), tmp_path / "other")
    shutil.copytree(other / "transformer", other / "transformer_2", dirs_exist_ok=True)
    assert PipelineFolder.open(other).sha256 != before


@pytest.mark.parametrize("boundary", [None, 0.0, 1.0, "0.8"])
def test_a_boundary_that_does_not_divide_the_levels_is_refused(saved: Saved, tmp_path: Path, boundary: Any) -> None:
    folder = shutil.copytree(saved("wan_2_2"), tmp_path / "wan")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": boundary}))
    with pytest.raises(UserError, match=r"two denoisers, but boundary_ratio = .* must lie between 0 and 1"):
        load_model(folder)


def test_a_discriminator_on_two_experts_is_refused_in_words(saved: Saved, tmp_path: Path) -> None:
    raw = wan(saved, tmp_path / "run")
    gan = {"weight": 1.0, "critic_weight": 1.0, "features": "teacher"}
    raw["stages"][0]["objective"] = {"name": "dmd2", "gan": gan}
    raw["stages"][0]["roles"]["discriminator"] = {"lr": 1e-3, "init": "new"}
    with pytest.raises(UserError):
        RunFolder.create(parse_config(raw, "test"), CPU)


def test_an_update_that_reaches_one_expert_leaves_the_other_as_it_is(saved: Saved, tmp_path: Path) -> None:
    """A student of one step is only evaluated at t = 1; the other expert has gradients of zero, for processes whose
    samples reach it."""
    raw = wan(saved, tmp_path / "run", health={"every": 0})
    raw["stages"][0]["objective"] = {"name": "tdm", "steps": 1}
    run = RunFolder.create(parse_config(raw, "test"), CPU)
    student = run.trainer.roles["student"]
    assert isinstance(student.module.backbone, Routed)
    before = [{name: p.clone() for name, p in expert.named_parameters()} for expert in student.module.backbone.experts]
    run.trainer.loop.step(0)
    high, low = (
        [torch.equal(p, values[name]) for name, p in expert.named_parameters()]
        for expert, values in zip(student.module.backbone.experts, before, strict=True)
    )
    assert not all(high)
    assert all(low)


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
def test_an_exported_student_has_the_networks_that_its_steps_need(
    saved: Saved, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Phased DMD with a boundary between its phases that is not the teacher's: of the steps at 1, .75 | .5, .25 the
    first needs the first expert of the first phase, the second its second, the others the second of the second."""
    pytest.importorskip("peft")
    raw = wan(saved, tmp_path / "run", adapters, health={"every": 0})
    phased = {"name": "phased_dmd", "steps": 4, "phases": 2, "critic_updates": 1}
    rates = {role: {"lr": 0.01} for role in ("student", "fake")}
    raw["stages"] = [
        {"steps": 1, "objective": phased | {"phase": 1}, "roles": rates},
        {"steps": 1, "objective": phased | {"phase": 2}, "roles": rates, "freeze": {"expert1": "student"}},
    ]
    run = RunFolder.create(parse_config(raw, "test"), CPU)
    run.train()
    student = load_model(tmp_path / "run" / "student")
    x = torch.randn(2, *student.config.shape, generator=torch.Generator().manual_seed(0))
    condition = run.trainer.loop.sources["data"](KeyedRandom(0, 0, "test", 0), 2).condition
    out = fewstep.export(tmp_path / "run", ExportFormat.diffusers, tmp_path / "out")
    assert json.loads((out / "fewstep.json").read_text())["boundaries"] == [0.875, 0.625, 0.0]
    exported = load_model(out)
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            ours, theirs, again = (
                d(x, t, condition).raw for d in (run.trainer.generator, exported.denoiser, student.denoiser)
            )
            assert torch.equal(again, ours)
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_student_that_needs_one_expert_is_exported_with_one(saved: Saved, tmp_path: Path) -> None:
    raw = wan(saved, tmp_path / "run", health={"every": 0})
    raw["stages"][0]["objective"] = {"name": "tdm", "steps": 1}
    RunFolder.create(parse_config(raw, "test"), CPU).train()
    out = fewstep.export(tmp_path / "run", ExportFormat.diffusers, tmp_path / "out")
    index = json.loads((out / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None]
    assert index["boundary_ratio"] is None
    assert not (out / "transformer_2").exists()
    ours, theirs = (load_model(path) for path in (tmp_path / "run/student", out))
    x = torch.randn(1, *ours.config.shape, generator=torch.Generator().manual_seed(0))
    condition = Condition(TINY["wan_2_2"].embeddings(1, 1))
    with torch.no_grad():
        written, trained = (model.denoiser(x, 1.0, condition).raw for model in (theirs, ours))
    torch.testing.assert_close(written, trained)


def test_processes_whose_samples_reach_different_experts_equal_one(saved: Saved, tmp_path: Path) -> None:
    """With whole networks and with split ones, of which all processes must differentiate both experts."""
    raw = wan(saved, tmp_path / "one", health={"every": 0}, batch=1, accumulate=2, device="cpu")
    raw["stages"][0] |= {"steps": 3, "objective": {"name": "tdm", "steps": 2}}
    one = train_to(3, {"one": raw})["one"]
    runs = {shard: raw | {"out": str(tmp_path / str(shard)), "shard": shard} for shard in (False, True)}
    for state in train_on(2, 3, runs, tmp_path).values():
        assert largest_difference(state, one, ["weights"]) < 1e-6
    start = train_to(0, {"start": raw | {"out": str(tmp_path / "start")}})["start"]
    for k in (0, 1):
        names = [name for name in one if f"student/weights/backbone.experts.{k}." in name]
        assert any(not torch.equal(one[name], start[name]) for name in names), f"expert {k} was not trained"


def test_both_experts_are_planned(saved: Saved, tmp_path: Path) -> None:
    planned = {
        name: plan_memory(parse_config(settings(saved(name), name, tmp_path / name, None), "test")).roles["student"]
        for name in ("wan", "wan_2_2")
    }
    assert planned["wan_2_2"].weights == 2 * planned["wan"].weights
    assert planned["wan_2_2"].moments == 2 * planned["wan"].moments


def test_published_experts_have_their_size() -> None:
    """2 x 14.3 billion (model card of Wan 2.2: 27B in all)."""
    network = skeleton("Wan-AI/Wan2.2-T2V-A14B-Diffusers", None, torch.bfloat16).denoiser
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(2 * 14.288e9, rel=1e-3)
