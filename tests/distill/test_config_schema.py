"""The JSON Schema of run configs: the committed file is current, and accepts and refuses what loading does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.distill.config_files import CONFIGS

FILE = CONFIGS / "config.schema.json"
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
TYPES = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}


def test_the_committed_schema_is_the_generated_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewstep.distill.config_schema", str(tmp_path / "schema.json")]
    subprocess.run(command, check=True)
    assert (tmp_path / "schema.json").read_text() == FILE.read_text(), (
        f"run: python -m {command[2]} configs/{FILE.name}"
    )


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid, for the keywords that occur in the schema."""
    if "$ref" in schema:
        return conforms(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return any(conforms(value, option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if not schema:
        return True
    if schema["type"] in ("integer", "number"):
        kinds = (int,) if schema["type"] == "integer" else (int, float)
        low, high = schema.get("minimum", -1e300), schema.get("maximum", 1e300)
        above, below = schema.get("exclusiveMinimum", -1e300), schema.get("exclusiveMaximum", 1e300)
        return isinstance(value, kinds) and low <= value <= high and above < value < below
    if not isinstance(value, TYPES[schema["type"]]):
        return False
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, list):
        items = schema.get("prefixItems") or [schema["items"]] * len(value)
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(conforms(one, item) for one, item in zip(value, items, strict=False))
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not set(schema.get("required", ())) <= set(value) or (others is False and not set(value) <= set(known)):
            return False
        rest = others if isinstance(others, dict) else {}
        return all(conforms(entry, known.get(key, rest)) for key, entry in value.items())
    return True


CONFIG_FILES = [file for file in CONFIGS.rglob("*.yaml") if "\nstages:" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", sorted(CONFIG_FILES), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_run_config_that_ships_conforms(file: Path) -> None:
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert conforms(settings, SCHEMA)
    try:
        import jsonschema
    except ImportError:
        return
    jsonschema.validate(settings, SCHEMA)


ROLES = {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}}


def run(**changes: Any) -> dict[str, Any]:
    stage = {"steps": 5, "objective": {"name": "tdm", "steps": 2}, "roles": ROLES}
    return {"teacher": "fashion", "stages": [{**stage, **changes.pop("stage", {})}], **changes}


@pytest.mark.parametrize(
    ("settings", "valid"),
    [
        (run(), True),
        (run(stage={"objective": "tdm"}), True),
        (run(stage={"objective": {"name": "mine:Method", "anything": 1}}), True),
        (run(stage={"objective": "mine:Method"}), True),
        (run(data={"kind": "prompts", "path": "p", "sizes": [[8, 8, 1]]}), True),
        (run(stage={"objective": {"name": "dmd2", "gan": {"weight": 1.0}}}), True),
        (run(stage={"objective": {"name": "tdm", "gan": {"weight": 1.0}}}), False),
        (run(stage={"objective": {"name": "tdmm"}}), False),
        (run(stage={"objective": {"name": "tdm", "huber": -1}}), False),
        (run(stage={"objective": {"name": "tdm", "renoise_times": "some"}}), False),
        (run(stage={"steps": 0}), False),
        (run(stage={"roles": {"student": {"lr": "fast"}}}), False),
        (run(bach=3), False),
        (run(data={"kind": "prompts", "sizes": [[8, 8]]}), False),
        ({"teacher": "fashion"}, False),
    ],
)
def test_the_schema_accepts_and_refuses(settings: dict[str, Any], valid: bool) -> None:
    assert conforms(settings, SCHEMA) is valid
