"""What an export tells the hub: the header and images of its card, and the upload, of which nothing is sent here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from commands import refused, succeeds
from exported import ADAPTERS, absent
from PIL import Image
from tiny_pipelines import settings

import fewstep
from fewstep.api import export
from fewstep.core.errors import UserError
from fewstep.core.image_grid import image_grid
from fewstep.distill.config_files import parse_config
from fewstep.models.hub import export as exporting
from fewstep.models.hub.card import SAMPLES, license_of
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.loading import load_model
from fewstep.models.model_config import FewStep
from fewstep.models.saving import save_model

pytest.importorskip("peft")
Runs = Callable[..., Path]
NAME = "me/my-student"
PROMPTS = ["a red coat on blue", "a green bag on white", "a blue sneaker on black"]


def header(out: Path) -> dict[str, Any]:
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert body.startswith("\n# ")
    return yaml.safe_load(front)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the bundled text-conditioned teacher, which is the student too."""
    run = tmp_path_factory.mktemp("text") / "run"
    model = load_model("fashion-text")
    few_step = FewStep(times=(1.0, 0.75, 0.5, 0.25), rule="deterministic")
    save_model(model.denoiser, model.config.model_copy(update={"few_step": few_step}), run / "student")
    (run.parent / "prompts").mkdir()
    (run.parent / "prompts" / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    stages = [{"objective": {"name": "tdm"}, "steps": 1}]
    settings = {"teacher": "fashion-text", "data": {"path": str(run.parent / "prompts")}, "stages": stages}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_the_header_says_what_is_known(runs: Runs, tmp_path: Path) -> None:
    found = header(fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "lora"))
    tags = ["fewstep", "few-step", "distillation", "tdm"]
    assert found == {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    assert header(fewstep.export(runs("wan"), ExportFormat.merged, tmp_path / "w"))["pipeline_tag"] == "text-to-video"


@pytest.mark.parametrize(("form", "relation"), [(ExportFormat.lora, "adapter"), (ExportFormat.diffusers, "finetune")])
def test_the_header_names_a_base_of_the_hub_and_its_license(
    saved: Callable[[str], Path], tmp_path: Path, form: ExportFormat, relation: str
) -> None:
    base = tmp_path / "hub" / "models--owner--my-model" / "snapshots" / ("0123456789abcdef" * 2)
    shutil.copytree(saved("sd"), base)
    (base / "README.md").write_text("---\nlicense: openrail++\ntags: [x]\n---\n# Model\n")
    run = fewstep.train(parse_config(settings(base, "sd", tmp_path / "run", ADAPTERS), "test"))
    found = header(fewstep.export(run, form, tmp_path / "out"))
    assert (found["base_model"], found["base_model_relation"]) == ("owner/my-model", relation)
    assert found["license"] == "openrail++"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: 'mit'\n---\n", "mit"), ("license: mit\n", None), ("---\ntags: x\n---\nlicense: mit", None),
        ("---\nlicense: mit\n", None), ("", None), ("---\nlicense:\n---\n", None),
    ],
)  # fmt: skip
def test_a_license_is_read_from_a_header_alone(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected
    assert license_of(tmp_path / "none") is None


def test_a_card_shows_images_of_the_runs_prompts(text_run: Path, tmp_path: Path) -> None:
    out = fewstep.export(text_run, ExportFormat.diffusers, tmp_path / "out", samples=2)
    prompts = [PROMPTS[0], PROMPTS[1]]
    images = fewstep.sample(out, prompts=prompts, device="cpu")  # the exported pipeline, from the same seed
    expected = np.asarray(image_grid(images, columns=4, scale=2, gap=4)).astype(int)
    with Image.open(out / SAMPLES) as shown:
        assert np.abs(np.asarray(shown).astype(int) - expected).max() <= 1
    card = (out / "README.md").read_text()
    assert f"![Samples]({SAMPLES})" in card
    assert f"*{prompts[0]}*; *{prompts[1]}*." in card
    assert 'fewstep.load_pipeline(".")("a photo")' in card
    assert "teacher: fashion-text" in card
    assert load_model(out).config.few_step is not None


def test_a_card_has_no_images_if_none_are_wanted_or_prompts_are_missing(text_run: Path, tmp_path: Path) -> None:
    for name, run, count in (("none", text_run, 0), ("missing", tmp_path / "run", 8)):
        if run != text_run:
            run.mkdir()
            (run / "student").symlink_to(text_run / "student")
            (run / "config.yaml").write_text("data: {path: nowhere}\nstages: []\n")
        out = fewstep.export(run, ExportFormat.merged, tmp_path / name, samples=count)
        assert not (out / SAMPLES).exists()
        assert "![" not in (out / "README.md").read_text()


def test_large_images_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(6, 3, 1024, 1024, dtype=torch.uint8)
    monkeypatch.setattr(export, "ImageGenerator", lambda *_: lambda *_: images)
    grid = export._images(load_model("fashion"), ["x"] * 6)
    assert grid is not None
    assert grid.size == (export.GRID, export.GRID * 2 // 4)


class FakeApi:
    """Records what would be sent."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    public: ClassVar[bool | None] = None  # whether the repository is; None: there is none
    role = "write"
    fails = ""

    def __init__(self, token: str) -> None:
        self.calls.append(("token", {"token": token}))

    def whoami(self) -> dict[str, Any]:
        if self.fails == "token":
            raise OSError("401 Unauthorized")
        return {"name": "me", "auth": {"accessToken": {"role": self.role}}}

    def repo_exists(self, name: str) -> bool:
        return self.public is not None

    def create_repo(self, name: str, **settings: Any) -> None:
        if self.fails == "create":
            raise OSError("403 Forbidden: you have no rights\nmore")
        self.calls.append(("create", {"name": name, **settings}))

    def repo_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, **settings: Any) -> None:
        if self.fails == "upload":
            raise ConnectionError("no route")
        self.calls.append(("upload", settings))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    class Api(FakeApi):
        calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return Api


def test_nothing_is_sent_without_push(runs: Runs, hub: type[FakeApi], tmp_path: Path) -> None:
    fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out")
    assert hub.calls == []


def test_push_uploads_the_folder_to_a_private_repository(runs: Runs, hub: type[FakeApi], tmp_path: Path) -> None:
    out = fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME)
    token, create, (kind, sent) = hub.calls
    assert token == ("token", {"token": "secret"})
    assert create == ("create", {"name": NAME, "private": True})
    assert (kind, sent["repo_id"], sent["folder_path"]) == ("upload", NAME, out)
    card = (out / "README.md").read_text()
    assert f'pipe.load_lora_weights("{NAME}")' in card
    assert f'from_pretrained("{NAME}", subfolder="scheduler")' in card
    assert '"."' not in card
    assert "secret" not in "".join(file.read_text(errors="replace") for file in out.rglob("*") if file.is_file())


def test_the_command_uploads_privately_unless_it_should_be_public(
    runs: Runs, hub: type[FakeApi], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (option, private) in enumerate((((), True), (("--private",), True), (("--public",), False))):
        printed = succeeds(
            "export", runs("sd"), "--to", "lora", "--out", tmp_path / str(number), "--push", NAME, *option
        )
        assert hub.calls[-2][1]["private"] is private
        assert f"https://huggingface.co/{NAME}" in printed
    for option in ("--private", "--public"):
        assert f"remove {option}." in refused(capsys, "export", runs("sd"), "--out", tmp_path / "x", option)


@pytest.mark.parametrize(("public", "remedy"), [(True, "upload with --public"), (False, "upload without --public")])
def test_a_repository_of_the_other_visibility_is_refused(
    runs: Runs, hub: type[FakeApi], tmp_path: Path, public: bool, remedy: str
) -> None:
    hub.public = public
    kind = "public" if public else "private"
    with pytest.raises(UserError, match=f"exists and is {kind}: choose another name, or {remedy}"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME, private=public)
    assert [kind for kind, _ in hub.calls] == ["token"]
    assert not (tmp_path / "out").exists(), "refused before any work"
    fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME, private=not public)
    assert [kind for kind, _ in hub.calls] == ["token", "token", "upload"], "it exists, and is not created"


def test_what_cannot_be_uploaded_is_refused_before_any_work(
    runs: Runs, hub: type[FakeApi], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    with pytest.raises(UserError, match="may only read"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME)
    hub.fails = "token"
    with pytest.raises(UserError, match=rf"The hub did not accept {NAME}: 401 Unauthorized"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME)
    with pytest.raises(UserError, match=r"--push a/b/c: .* Give owner/name"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push="a/b/c")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token of the Hugging Face hub that may write: set HF_TOKEN"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME)
    assert not (tmp_path / "out").exists()


def test_nothing_is_created_on_the_hub_for_an_export_that_is_refused(
    runs: Runs, hub: type[FakeApi], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "full", push=NAME)
    assert not hub.calls, "a mistake on this machine is noticed before the hub is asked"
    for model, form in (("fashion", ExportFormat.lora), ("fashion-text", ExportFormat.lora), ("none", "lora")):
        with pytest.raises(UserError):
            fewstep.export(model, form, tmp_path / "out", push=NAME)
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="Not exported: the export differs"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME)
    assert {kind for kind, _ in hub.calls} == {"token"}


def test_a_failed_upload_is_reported_and_the_export_stays(runs: Runs, hub: type[FakeApi], tmp_path: Path) -> None:
    hub.fails = "create"
    message = rf"The hub did not accept {NAME}: 403 Forbidden: you have no rights\. The export is complete: .*/{{}}$"
    with pytest.raises(UserError, match=message.format("first")):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "first", push=NAME)
    hub.fails = "upload"
    with pytest.raises(UserError, match=rf"The hub did not accept {NAME}: no route\. The export is complete"):
        fewstep.export(runs("sd"), ExportFormat.lora, tmp_path / "out", push=NAME)
    assert json.loads((tmp_path / "out" / "fewstep.json").read_text())["form"] == "lora"


def test_a_pipeline_is_loaded_from_the_hub_by_its_name(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fewstep.export(runs("sd"), ExportFormat.diffusers, tmp_path / "out")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: out if name == NAME else 1 / 0)
    assert type(fewstep.load_pipeline(NAME, **absent(out))).__name__ == "StableDiffusionPipeline"

    def offline(name: str) -> str:
        raise OSError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"is no folder, and its download from the hub failed: offline$"):
        fewstep.load_pipeline(NAME)
