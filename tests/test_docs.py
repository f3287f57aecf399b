"""The documentation is true: its numbers come from committed files, its commands parse, its links and files exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import fewstep
from fewstep.api.bench_objectives import load_benchmark, run_config_of
from fewstep.cli.main import app
from fewstep.distill.config import DataConfig
from fewstep.distill.config_files import CONFIGS, find_config, load_config, parse_config
from fewstep.distill.objectives import OBJECTIVES
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.protocol import Protocol
from fewstep.eval.report.doc_blocks import refresh
from fewstep.samplers.solvers import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
FIXED = (
    "README",
    "ARCHITECTURE",
    "CONTRIBUTING",
    "CHANGELOG",
    "results/health/README",
    "eval/reference/emoji/README",
    "eval/reference/fashion/README",
)
CARDS = sorted((ROOT / "models" / "bundled").glob("*/README.md"))
PAGES = [*(ROOT / f"{name}.md" for name in FIXED), *CARDS, *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "benchmarks|configs|distill|docs|eval|examples|models|results|samplers|src|tests"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(text: str, *languages: str) -> list[str]:
    """The fenced blocks of some languages."""
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            if language in languages]  # fmt: skip


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# --- numbers ----------------------------------------------------------------------------------------------------------


@every_page
def test_tables_and_numbers_are_those_of_the_committed_results(page: Path) -> None:
    """Invariant 7."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT)
    assert refresh(text, page.parent) == text, f"run: python -m fewstep.eval.report.doc_blocks {name}"
    assert not re.search(r"^\s*<!-- value", text, re.MULTILINE), "Markdown takes such a line for HTML"


WITH_NUMBERS = [
    "README",
    "models/bundled/emoji/README",
    "models/bundled/fashion/README",
    *(f"docs/{name}" for name in ("results", "samplers", "health")),
]


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_a_page_of_results_has_generated_numbers(name: str) -> None:
    blocks = re.findall(r"<!-- ([a-z ]+): .+? -->", (ROOT / f"{name}.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 2, "somebody typed the numbers"


# --- links and files --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]+))?\)", text):
        file = (page.parent / target).resolve() if target else page
        if file.parent != ROOT / "docs" or file.name not in (
            "settings.md",
            "command_line.md",
        ):  # generated for the site
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@every_page
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\.\w+", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@every_page
def test_make_targets_in_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*fenced(text, "bash"), *re.findall(r"`([^`]+)`", prose(text))])
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) - set(known) == set()


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every ``fewstep`` command in the shell blocks, with variables that the block sets."""
    for block in fenced(text, "bash", "sh", ""):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            if assigned := re.match(r'(\w+)="(.*)"$', line):
                variables[assigned[1]] = assigned[2]
            elif line.startswith("fewstep "):
                yield shlex.split(line, comments=True)[1:]


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters; raises what the command line would show as an error."""
    command: Any = typer.main.get_command(app)
    path = []
    while hasattr(command, "commands"):
        while arguments[0].startswith("-"):
            option = next(known for known in command.params if arguments[0] in known.opts)
            arguments = arguments[1 if option.is_flag else 2 :]
        path.append(arguments[0])
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return " ".join(path), command.make_context(path[-1], arguments).params


WITH_COMMANDS = [page for page in PAGES if [*commands(page.read_text(encoding="utf-8"))]]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_a_page_parse(page: Path) -> None:
    for arguments in commands(page.read_text(encoding="utf-8")):
        name, parameters = parse(arguments)
        config = parameters.get("config") or ""
        if config.startswith("configs/"):
            load = load_benchmark if name == "bench objectives" else load_config
            load(config, parameters["overrides"] or [])
        solvers = f"{parameters.get('solver') or ''},{parameters.get('solvers') or ''}"
        assert [one for one in solvers.split(",") if one not in ("", "student") and one not in REGISTRY] == []


def test_the_parser_of_commands_refuses_mistakes() -> None:
    assert [*commands('```bash\nX="a=1 b"\nfewstep train c.yaml $X \\\n  d=2  # why\n```')] == [
        ["train", "c.yaml", "a=1", "b", "d=2"]
    ]
    assert parse(["--import", "mine", "solver", "fit-dc", "fashion", "--out", "x"])[0] == "solver fit-dc"
    for wrong in ("sample", "sample fashion --stepps 4", "sample fashion --steps four", "sampel fashion"):
        with pytest.raises(Exception, match=r"(?i)missing|no such option|not a valid|valid integer|sampel"):
            parse(wrong.split())


def test_commands_in_text_makefile_and_configs_exist() -> None:
    group: Any = typer.main.get_command(app)
    texts = [(page, "`fewstep", prose(page.read_text(encoding="utf-8"))) for page in PAGES]
    texts.append((ROOT / "Makefile", "BIN./fewstep", (ROOT / "Makefile").read_text(encoding="utf-8")))
    texts += [(file, "fewstep", file.read_text(encoding="utf-8")) for file in CONFIGS.rglob("*.yaml")]
    found = 0
    for file, start, text in texts:
        for first, second in re.findall(rf"{start}\s+([a-z][a-z-]*)\s*([a-z0-9-]*)", text):
            assert first in group.commands, f"{file.name}: fewstep {first}"
            below = getattr(group.commands[first], "commands", None)
            assert below is None or second in below, f"{file.name}: fewstep {first} {second}"
            found += 1
    assert found > 50, "the patterns no longer match"


@every_page
def test_python_in_a_page_uses_public_names(page: Path) -> None:
    for code in fenced(page.read_text(encoding="utf-8"), "python"):
        compile(code, str(page), "exec")
        used = set(re.findall(r"(?<![\w.])fewstep\.(\w+)", re.sub(r"^(from|import) .*", "", code, flags=re.MULTILINE)))
        assert used - set(fewstep.__all__) == set()


@every_page
def test_settings_in_a_page_are_valid(page: Path) -> None:
    for block in fenced(page.read_text(encoding="utf-8"), "yaml"):
        settings = yaml.safe_load(block)
        if "data" in settings and "stages" not in settings:
            DataConfig.model_validate(settings["data"])
        elif "stages" not in settings:
            Protocol.model_validate({"name": "page", **settings})
        elif ":" not in settings.get("teacher", "") and isinstance(settings["stages"][0]["objective"], dict):
            parse_config(settings, str(page))  # the others need code of the page: test_docs_code.py


# --- completeness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "names"),
    [("methods", OBJECTIVES.names()), ("samplers", REGISTRY.names()), ("evaluation", METRICS.names())],
    ids=["objectives", "solvers", "metrics"],
)
def test_everything_that_ships_is_described(page: str, names: list[str]) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_extra_is_described() -> None:
    text = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {extra for extra in project["optional-dependencies"] if f"| `{extra}` |" not in text} == {"dev", "mutants"}


RUNS = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "eval")


@pytest.mark.parametrize("file", RUNS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_config_that_ships_is_valid(file: Path) -> None:
    assert find_config(f"configs/{file.relative_to(CONFIGS)}").samefile(file)
    if "methods:" in file.read_text(encoding="utf-8"):
        benchmark = load_benchmark(file)
        assert all(run_config_of(benchmark, method).steps > 100 for method in benchmark.methods)
    else:
        assert load_config(file).steps > 0
