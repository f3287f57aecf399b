"""The documentation tells what is: its numbers are those of committed files, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from fewstep.distill.cli import app
from fewstep.distill.config import CONFIGS, find_config, load_config
from fewstep.eval.tables import BLOCK, refreshed

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
CARD = ROOT / "models" / "pretrained" / "fashion" / "README.md"


@pytest.mark.parametrize("page", [ROOT / "README.md", CARD], ids=["README", "card"])
def test_tables_are_those_of_the_committed_results(page: Path) -> None:
    """Invariant 7."""
    text = page.read_text(encoding="utf-8")
    assert BLOCK.search(text), "no table of scores"
    assert refreshed(text, page.parent) == text, f"run: python -m fewstep.eval.tables {page.relative_to(ROOT)}"


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: page.parent.name + "/" + page.name)
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_commands_of_the_readme_exist() -> None:
    group = typer.main.get_command(app)
    known = set(group.commands)  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^fewstep (\w+)(.*)", text, re.MULTILINE)
    assert len(named) >= 6
    for command, rest in named:
        assert command in known
        for config in re.findall(r"configs/\S+\.yaml", rest):
            assert find_config(config).is_file()


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_that_ships_is_valid(file: Path) -> None:
    assert load_config(file).steps > 0
