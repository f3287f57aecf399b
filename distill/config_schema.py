"""The JSON Schema of run configs, for completion and checks in editors.

``python -m fewstep.distill.config_schema FILE`` writes it; ``configs/config.schema.json`` is its output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fewstep.core.files import write_text
from fewstep.core.registry import DOTTED
from fewstep.distill.config import Config
from fewstep.distill.objectives import OBJECTIVES

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The schema of ``Config`` in which an objective is a name, or a name with that objective's settings.

    An objective given by a dotted name may have any settings.
    """
    schema = Config.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    names = OBJECTIVES.names()
    dotted = {"type": "string", "pattern": f"^{DOTTED.pattern}$"}
    own: dict[str, Any] = {"type": "object", "properties": {"name": dotted}, "required": ["name"]}
    forms: list[dict[str, Any]] = [{"enum": names}, dotted, own]
    for name in names:
        cls = OBJECTIVES.resolve(name)
        settings = cls.model_json_schema()
        definitions |= settings.pop("$defs", {})
        settings["properties"]["name"] = {"const": name}
        definitions[name] = {**settings, "required": ["name"], "description": cls.description()}
        forms.append({"$ref": f"#/$defs/{name}"})
    definitions["ObjectiveConfig"] = {"title": "Objective", "anyOf": forms}
    return {"$schema": DIALECT, **schema}


def main(file: str) -> None:
    """Writes the schema to a file."""
    write_text(json.dumps(config_schema(), indent=1) + "\n", Path(file))


if __name__ == "__main__":
    main(sys.argv[1])
