"""The card of an export: its code is run, and must sample like the student; its words reveal no local path."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import ADAPTERS, card_samples, run_card, student_samples
from tiny_pipelines import STEPS, TINY, difference, settings

import fewstep
from fewstep.core.files import read_tensors
from fewstep.distill.config_files import parse_config
from fewstep.models.hub.card import CardContent, without_paths
from fewstep.models.hub.export import export
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model

pytest.importorskip("peft")
Saved = Callable[[str], Path]
Runs = Callable[..., Path]
FORMS = list(ExportFormat)


def check(out: Path, run: Path, base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out)
    pipeline, arguments = run_card(out, base)
    for _ in range(2):  # the second call must start with the first expert again
        noise, theirs = card_samples(TINY[name], PipelineFolder.open(base), pipeline, arguments)
        assert (
            difference(student_samples(run / "student", TINY[name], pipeline, noise), theirs) < 3e-6
        )  # another expert changes some by 8e-6


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in TINY for form in (FORMS if name != "wan_2_2" else FORMS[:1])]
)
def test_the_code_on_a_card_samples_as_the_student(
    runs: Runs, saved: Saved, name: str, form: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = 1.0 if name in ("sd", "sd2", "sdxl", "pixart") else 3.0
    run = runs(name, shift=shift)
    out = fewstep.export(run, form, tmp_path / "out")
    card = (out / "README.md").read_text()
    if form in (ExportFormat.lora, ExportFormat.comfyui):
        words = "sampler `euler`, scheduler `simple`, steps 4, cfg 1.0" if shift == 1 else "with shift 3, then sampler"
        assert words in card
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    if name == "pixart" and form is ExportFormat.comfyui:
        assert "```python" not in card, "diffusers has no loader for these keys"
        return
    check(out, run, saved(name), name, monkeypatch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sdxl", "pixart", "flux", "wan"])
def test_the_code_on_a_card_samples_a_student_with_two_experts(
    runs: Runs, saved: Saved, name: str, form: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(name, experts=2)
    out = fewstep.export(run, form, tmp_path / "out")
    assert json.loads((out / "fewstep.json").read_text())["boundaries"] == [0.625, 0.0]
    card = (out / "README.md").read_text()
    if form in (ExportFormat.lora, ExportFormat.comfyui):
        assert "`expert_1` from step 0 to 2, `expert_2` from step 2 to 4" in card
    if name == "pixart" and form is ExportFormat.comfyui:
        assert sorted(file.name for file in out.glob("*.safetensors")) == [f"expert_{k}.safetensors" for k in (1, 2)]
        return
    if name == "wan" and form is ExportFormat.diffusers:
        assert json.loads((out / "model_index.json").read_text())["boundary_ratio"] == 0.625
        assert "change" not in card, "the pipeline changes the denoiser itself"
    check(out, run, saved(name), name, monkeypatch)


@pytest.mark.parametrize("form", [ExportFormat.diffusers, ExportFormat.merged])
def test_copies_with_two_experts_are_exported_too(
    runs: Runs, saved: Saved, form: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("sd", None, experts=2)
    check(fewstep.export(run, form, tmp_path / "out"), run, saved("sd"), "sd", monkeypatch)


def test_an_untrained_expert_is_the_base(
    saved: Saved, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two phases: the second expert is the teacher, for which the adapter is zero."""
    raw = settings(saved("sd"), "sd", tmp_path / "run", ADAPTERS)
    raw["stages"][0]["objective"] = {"name": "phased_dmd", "steps": STEPS, "phases": 2, "critic_updates": 1}
    run = fewstep.train(parse_config(raw, "test"))
    out = fewstep.export(run, ExportFormat.lora, tmp_path / "out")
    assert all(not tensor.any() for tensor in read_tensors(out / "expert_2.safetensors").values())
    check(out, run, saved("sd"), "sd", monkeypatch)


def test_the_whole_code_on_a_card_runs(
    runs: Runs, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exported import card_code

    monkeypatch.chdir(fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out"))
    found: dict[str, Any] = {}
    exec(card_code(tmp_path / "out").replace(f'"{saved("sd").name}"', repr(str(saved("sd")))), found)
    assert found["image"].size == (16, 16)


# ---- words


def leaks(out: Path, *secrets: Path) -> list[str]:
    """The text files and headers of an export that contain a local path."""
    files = [file for file in out.rglob("*") if file.is_file()]
    return [file.name for file in files if any(str(secret).encode() in file.read_bytes() for secret in secrets)]


@pytest.mark.parametrize("form", FORMS)
def test_an_export_contains_no_local_path(runs: Runs, saved: Saved, form: ExportFormat, tmp_path: Path) -> None:
    run = runs("sd")
    out = fewstep.export(run, form, tmp_path / "out")
    assert leaks(out, run, run.parent, saved("sd"), Path.home(), tmp_path) == []
    card = (out / "README.md").read_text()
    assert f"teacher: {saved('sd').name}\n" in card
    assert "path: prompts\n" in card
    assert "out: run\n" in card
    assert not re.search(r"[ '\"]/", card)


def test_copied_components_and_added_text_contain_no_local_path(saved: Saved, tmp_path: Path) -> None:
    """Loaders write the path that a component came from into its config."""
    base = tmp_path / "base"
    shutil.copytree(saved("sd"), base)
    for file in (base / "model_index.json", base / "vae" / "config.json", base / "text_encoder" / "config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": str(base)}))
    content = CardContent(f"Compared with {tmp_path}/ref.npz.")
    out = export(load_model(base), ExportFormat.diffusers, tmp_path / "out", content)
    assert leaks(out, tmp_path) == []
    assert "Compared with ref.npz." in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("teacher: /home/me/sd15", "teacher: sd15"),
        ("- '/data/a/b.npz' and ~/x/y.txt", "- 'b.npz' and y.txt"),
        (r"C:\models\sd15, D:/refs/r.npz", "sd15, r.npz"),
        ("| reference | /mnt/ref.npz |", "| reference | ref.npz |"),
        ("configs/a.yaml, https://arxiv.org/abs/1, 3/4", "configs/a.yaml, https://arxiv.org/abs/1, 3/4"),
    ],
)  # fmt: skip
def test_absolute_paths_are_removed_from_text(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_the_card_of_a_hub_teachers_student_is_headed_by_its_hub_id(saved: Saved, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--my-model" / "snapshots" / ("0123456789abcdef" * 2)
    shutil.copytree(saved("sd"), snapshot)
    run = fewstep.train(parse_config(settings(snapshot, "sd", tmp_path / "run", ADAPTERS), "test"))
    out = fewstep.export(run, ExportFormat.lora, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "\n---\n\n# A 2-step student of owner/my-model\n" in card
    assert 'DiffusionPipeline.from_pretrained("owner/my-model")' in card
    assert json.loads((out / "fewstep.json").read_text())["base"] == "owner/my-model"


# ---- reading exports back


def test_an_exported_pipeline_is_read_back_as_the_student(runs: Runs, tmp_path: Path) -> None:
    for name, experts in (("sd3", 1), ("sdxl", 2)):
        run = runs(name, experts=experts)
        model = load_model(fewstep.export(run, ExportFormat.diffusers, tmp_path / name))
        student = load_model(run / "student")
        assert model.config.few_step == student.config.few_step
        assert model.config.boundaries == student.config.boundaries
        assert model.config.shape == student.config.shape


def test_a_merged_denoiser_is_read_back_with_its_pipeline(
    runs: Runs, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.core.errors import UserError

    out = fewstep.export(runs("sd", experts=2), ExportFormat.merged, tmp_path / "merged")
    with pytest.raises(UserError, match=rf"without its pipeline, '{saved('sd').name}'.*Set base in .*fewstep\.json"):
        load_model(out)
    content = json.loads((out / "fewstep.json").read_text())
    (out / "fewstep.json").write_text(json.dumps(content | {"base": str(saved("sd"))}))
    assert fewstep.sample(out, prompts=["a cat"], device="cpu").shape == (1, 3, 16, 16)
    assert load_model(out).config.few_step == load_model(runs("sd", experts=2) / "student").config.few_step
    lora = fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "lora")
    with pytest.raises(UserError, match="is an exported adapter for"):
        load_model(lora)
