"""Adds to the site two generated pages, and the files of the repository outside ``docs`` that pages link to.

A page links to such a file as the repository has it (``../results/x.png``). The site has the file under
``repository/``, and the link is rewritten.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fewstep.cli.main import app
from fewstep.distill.config_schema import config_schema
from fewstep.distill.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)]*)?(\))")
COMMENT = re.compile(r"^<!--[^\n]*-->\n|<!--.*?-->", re.MULTILINE)
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and, transitively, the linked files outside ``docs``."""
    files.append(File.generated(config, "command_line.md", content=command_line_page()))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    navigation = Path(config.config_file_path).read_text(encoding="utf-8")
    names = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.abs_src_path]
    names += re.findall(r" repository/(\S+)", navigation)
    for name in names:  # grows in the loop
        if not name.startswith("docs/"):
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            text = FENCED.sub("", (ROOT / name).read_text(encoding="utf-8"))
            targets = dict.fromkeys(_resolve(name, match[2]) for match in LINK.finditer(text))
            names += [
                target
                for target in targets
                if target not in names and not target.startswith("docs/") and (ROOT / target).is_file()
            ]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Removes HTML comments (they mark generated tables and numbers) and rewrites links that leave ``docs``."""
    uri = page.file.src_uri
    name = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"

    def rewrite(match: re.Match[str]) -> str:
        target = _resolve(name, match[2])
        in_site = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return f"{match[1]}{os.path.relpath(in_site, os.path.dirname(uri) or '.')}{match[3] or ''}{match[4]}"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, COMMENT.sub("", part)) for part in parts)


def _resolve(page: str, target: str) -> str:
    """The path in the repository that a link in a page leads to."""
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])


# --- command line -----------------------------------------------------------------------------------------------------


def command_line_page() -> str:
    """Every command with its arguments, options, defaults and example."""
    parts = ["# Command line\n\nGenerated from the program; `fewstep COMMAND --help` prints the same.\n"]
    for path, command in commands(typer.main.get_command(app), "fewstep"):
        parameters = [parameter for parameter in command.params if "--help" not in parameter.opts]
        usage = " ".join(filter(None, [path, *map(_usage, parameters), "[OPTIONS]"]))
        rows = [[f"`{_label(one)}`", _default(one), one.help or ""] for one in parameters]
        parts += [
            f"## {path}\n\n{inspect.cleandoc(command.help or '')}\n\n```text\n{usage}\n```\n",
            _table([["argument or option", "default", "meaning"], *rows]),
            f"{(command.epilog or '').replace('Example: ', 'Example: `')}`\n",
        ]
    return "\n".join(parts)


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups below it, with their full names."""
    for name, child in group.commands.items():
        if hasattr(child, "commands"):
            yield from commands(child, f"{path} {name}")
        else:
            yield f"{path} {name}", child


def _label(parameter: Any) -> str:
    option = parameter.opts[0].startswith("-")
    return ", ".join(parameter.opts) if option else str(parameter.metavar or parameter.name.upper())


def _usage(parameter: Any) -> str:
    label = _label(parameter)
    if label.startswith("-"):
        return f"{label} …" if parameter.required else ""
    return label if parameter.required or label.startswith("[") else f"[{label}]"


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    return "" if value is None or value is False else f"`{getattr(value, 'value', value)}`"


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of a run's config, from its JSON Schema."""
    schema = config_schema()
    definitions, objectives = schema["$defs"], OBJECTIVES.names()
    shared = [name for name in definitions if name not in ("ObjectiveConfig", *objectives)]
    return "\n".join(
        [
            "# Settings\n",
            "Generated from the schema of run configs. A run's own `config.yaml` has every setting with its value.\n",
            _section("Config", schema, 2),
            *(_section(name, definitions[name], 2) for name in shared),
            "## Objectives\n",
            "`objective:` is one of these names, or a mapping with `name:` and settings. *published* are the values of",
            "the paper or its code.\n",
            *(_section(name, definitions[name], 3, dict(OBJECTIVES.resolve(name).published)) for name in objectives),
        ]
    )


def _section(name: str, part: dict[str, Any], level: int, published: dict[str, str] | None = None) -> str:
    """A heading, the description and a table; ``published`` is for objectives, whose description is preformatted."""
    part = part if "properties" in part else part["anyOf"][-1]  # a mapping that one word can stand for
    description = part.get("description", "")
    text = description.replace("``", "`") if published is None else f"```text\n{description}\n```"
    head = ["setting", "type", "default", *([] if published is None else ["published"])]
    rows = []
    for key, setting in part["properties"].items():
        if key != "name" or published is None:
            default = "required" if key in part.get("required", ()) else _shown(setting.get("default"))
            own = [] if published is None else [published.pop(key, "")]
            rows.append([f"`{key}`", kind(setting), default, *own])
    rows += [[f"`{key}`", "of the run", "", value] for key, value in (published or {}).items()]
    return f"{'#' * level} {name}\n\n{text}\n\n{_table([head, *rows])}"


LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def kind(setting: dict[str, Any]) -> str:
    """The type of a setting, with its limits."""
    if "$ref" in setting:
        name = setting["$ref"].rpartition("/")[2]
        return "[objective](#objectives)" if name == "ObjectiveConfig" else f"[{name}](#{name.lower()})"
    if "anyOf" in setting:
        return " or ".join(map(kind, setting["anyOf"]))
    if "enum" in setting or "const" in setting:
        return ", ".join(f"`{value}`" for value in setting.get("enum", [setting.get("const")]))
    if setting.get("type") == "array":
        items = setting.get("prefixItems")
        return f"{len(items)} × {kind(items[0])}" if items else f"list of {kind(setting['items'])}"
    if setting.get("type") == "object":
        value = setting.get("additionalProperties")
        return f"mapping of names to {kind(value)}" if isinstance(value, dict) else "mapping"
    limits = [f"{sign} {setting[key]:g}" for key, sign in LIMITS.items() if key in setting]
    return " ".join([WORDS[setting["type"]], *limits])


def _shown(default: Any) -> str:
    if isinstance(default, dict):
        return "see there"
    return f"`{'null' if default is None else str(default).lower() if isinstance(default, bool) else default}`"
