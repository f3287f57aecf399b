"""Code in the documentation: the method of Contributing, the modules of "Your own modules", the generated pages."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from commands import succeeds
from worlds import tiny_teacher

import fewstep
from fewstep.cli.main import app
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.distill import objectives
from fewstep.distill.config import Config
from fewstep.distill.objectives import OBJECTIVES
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.rewards.registry import REWARDS

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# --- Contributing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def method(tmp_path: Path) -> Path:
    """The method of Contributing, as a file."""
    (code,) = blocks("CONTRIBUTING.md", "python")
    file = tmp_path / "objectives" / "diff_instruct.py"
    file.parent.mkdir()
    file.write_text(code)
    return file


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict", "--config-file", "pyproject.toml"]],
    ids=["ruff rules", "ruff format", "mypy"],
)
def test_the_method_of_contributing_passes_the_projects_checks(method: Path, command: list[str]) -> None:
    config = ["--config", "pyproject.toml"] if command[0] == "ruff" else []
    done = subprocess.run(
        [sys.executable, "-m", *command, *config, str(method)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_method_of_contributing_trains(method: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(method.parent)])
    (settings,) = blocks("CONTRIBUTING.md", "yaml")
    (tmp_path / "config.yaml").write_text(settings)
    changes = [
        f"teacher={tiny_teacher(tmp_path / 'teacher')}",
        f"out={tmp_path / 'run'}",
        "stages.0.steps=3",
        "batch=4",
    ]
    run = fewstep.train(tmp_path / "config.yaml", *changes, "device=cpu")
    assert OBJECTIVES.resolve("diff_instruct").__name__ == "DiffInstruct"
    assert fewstep.sample(run, n=3, device="cpu").shape == (3, 1, 8, 8)
    assert (run / "metrics.jsonl").read_text().count("loss/match") == 1
    monkeypatch.delitem(sys.modules, "fewstep.distill.objectives.diff_instruct")


# --- smaller students -------------------------------------------------------------------------------------------------

SHORT = ["stages.0.steps=2", "batch=2", "health.every=0", "device=cpu"]


def example(page: str, folder: Path) -> Path:
    """The config of a page's section "A smaller student", as a file."""
    section = (ROOT / page).read_text(encoding="utf-8").split("\n## A smaller student\n")[1].split("\n## ")[0]
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (folder / "small.yaml").write_text(settings)
    return folder / "small.yaml"


def test_the_small_student_of_methods_trains(tmp_path: Path) -> None:
    run = fewstep.train(example("docs/methods.md", tmp_path), *SHORT, f"out={tmp_path / 'run'}")
    student, teacher = (sum(p.numel() for p in fewstep.load(m, "cpu").denoiser.parameters()) for m in (run, "fashion"))
    assert student < teacher / 4
    assert fewstep.sample(run, n=2, device="cpu").shape == (2, 1, 28, 28)


def test_the_small_student_of_pipelines_trains(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "prompts.txt").write_text("a red bag\na green shirt\n")
    succeeds("data", "encode", tmp_path / "prompts.txt", "--teacher", "fashion-text", "--out", tmp_path / "prompts")
    changes = [f"out={tmp_path / 'run'}", f"data.path={tmp_path / 'prompts'}"]
    run = fewstep.train(example("docs/pipelines.md", tmp_path), *SHORT, *changes)
    network = fewstep.load(run, "cpu").denoiser.backbone.network
    assert tuple(network.config.block_out_channels) == (32, 96)
    assert len(fewstep.sample(run, prompts=["a red bag"], device="cpu")) == 1


# --- Your own modules -------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the module path with the page's code as ``mine.py`` and its config as ``mine.yaml``."""
    (tmp_path / "mine.py").write_text("\n\n".join(blocks("docs/own_modules.md", "python")))
    (settings,) = blocks("docs/own_modules.md", "yaml")
    (tmp_path / "mine.yaml").write_text(settings)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_own_modules_train_and_sample_by_their_names(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fewstep.train("mine.yaml", "device=cpu")
    module = sys.modules["mine"]
    assert isinstance(fewstep.load(run, "cpu").denoiser.backbone, module.Net)
    assert fewstep.sample(run, n=6, device="cpu").shape == (6, 1, 8, 8)
    sampling = fewstep.SamplingConfig("mine:ADAMS", steps=4)
    assert fewstep.sample("mine:teacher", n=3, sampling=sampling, device="cpu").shape == (3, 1, 8, 8)
    monkeypatch.delitem(sys.modules, "mine")
    with pytest.raises(UserError, match="import mine first"):
        fewstep.load(run, "cpu")


def test_own_modules_serve_as_objects_rewards_and_metrics(mine: Path) -> None:
    module: ModuleType = importlib.import_module("mine")
    assert OBJECTIVES.resolve("one_step") is module.OneStep
    student = module.train_in_memory(2)
    assert student.config.few_step is not None
    assert student.config.few_step.times == (1.0,)
    images = torch.stack([torch.zeros(1, 8, 8), torch.eye(8)[None] * 255]).byte()
    low, high = REWARDS.resolve("mine:contrast")(None, images, torch.zeros(2))
    assert low < high
    assert METRICS.resolve("mine:MEAN_DISTANCE").needs_reference


# --- generated pages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> Any:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_page_has_every_command_and_option(hooks: Any) -> None:
    page = hooks.command_line_page()
    found = dict(hooks.commands(typer.main.get_command(app), "fewstep"))
    assert {"fewstep train", "fewstep solver fit-v3", "fewstep bench step"} <= set(found)
    for name, command in found.items():
        section = page.split(f"## {name}\n")[1].split("\n## ")[0]
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option == "--help" or f"`{option}`" in section, f"{name} {option}"


def test_the_settings_page_has_every_setting(hooks: Any) -> None:
    page = hooks.settings_page()
    for name, cls in [("Config", Config), *((name, OBJECTIVES.resolve(name)) for name in OBJECTIVES.names())]:
        section = re.split(rf"^#+ {name}\n", page, flags=re.MULTILINE)[1].split("\n#")[0]
        missing = [key for key in cls.model_fields if key != "name" and f"| `{key}` |" not in section]
        assert not missing, f"{name}: {missing}"
    assert "| `weights` | `float32`, `bfloat16`, `int8`, `nf4` | `float32` |" in page


def test_links_that_leave_the_docs_are_rewritten(hooks: Any) -> None:
    class Page:
        class file:
            src_uri = "api/index.md"

    code = "```\n[c](../../d)\n```\n"
    text = f"see [a](../../results/x.png), [b](../methods.md#now) <!-- value: f -->3<!-- /value -->\n{code}"
    rewritten = hooks.on_page_markdown(text, Page, None, None)
    assert rewritten == f"see [a](../repository/results/x.png), [b](../methods.md#now) 3\n{code}"


def test_the_navigation_of_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if f" {page}\n" not in text} == set()
    assert yaml.safe_load(text)["theme"]["font"] is False, "fonts would be loaded from the internet"
