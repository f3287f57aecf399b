"""YAML by the core rules of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3), so that a file means what its editor shows.

Unlike in YAML 1.1, ``yes`` and ``2020-01-01`` are texts, ``1:30`` is not 90, ``010`` is 10, and ``1e-4`` is a number.
Keys are texts. Tags are refused, and so are repeated keys and files that would expand beyond limits. Anchors, aliases
and merge keys (``<<``) work.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fewstep.core.errors import UserError
from fewstep.core.files import reading

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_DIGITS = 1 << 20, 50, 20_000, 18
TAG = "tag:yaml.org,2002:"
SCALARS = {
    "null": (r"null|Null|NULL|~|", ["", *"~nN"]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}  # for each type the plain scalars that belong to it, and their first characters


class _Loader(yaml.SafeLoader):
    """Composes nodes; refuses tags and deep nesting before Python's stack is used up."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise _error(f"the tag {event.tag} is not supported; remove it", event.start_mark)
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if self.depth > MAX_DEPTH else f"{MAX_NODES:,} values"
            raise _error(f"more than {limit}, too many for settings", event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {}  # without the rules of YAML 1.1
for name, (pattern, first) in SCALARS.items():
    for cls in (_Loader, _Dumper):
        cls.add_implicit_resolver(TAG + name, re.compile(rf"(?:{pattern})\Z"), first)


def read_yaml(file: Path) -> Any:
    """The content of a YAML file. Raises ``UserError`` that names the file and the line."""
    with reading(file, "YAML file"):
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file} is larger than {MAX_BYTES:,} bytes, too large for a file of settings.")
        text = file.read_bytes().decode("utf-8-sig")
    return parse_yaml(text, str(file))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; ``name`` is for messages. Raises ``UserError`` that names the line and, for a repeated
    key, the key."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return _Values().of(node, 0) if node is not None else None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise UserError(f"{name}, line {line} has a character that YAML forbids ({error.reason}).") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{name} is not valid YAML: line {line}: {error.problem}.") from error
    except (ValueError, ArithmeticError) as error:  # of PyYAML, for an escape such as "\UFFFFFFFF"
        raise UserError(f"{name} is not valid YAML: {error}.") from error


def dump_yaml(value: Any) -> str:
    """YAML, with keys in their order; ``parse_yaml`` returns an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


class _Values:
    """Python values of nodes. An alias is expanded wherever it stands, and every node counts towards the limit."""

    def __init__(self) -> None:
        self._nodes = 0

    def of(self, node: yaml.Node, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _error(f"its aliases stand for more than {MAX_NODES:,} values", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, depth + 1) for item in node.value]
        return self._mapping(node, depth) if isinstance(node, yaml.MappingNode) else _scalar(node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a text", key.start_mark)
            if key.tag == f"{TAG}merge":
                mappings = self.of(value, depth + 1)
                for mapping in mappings if isinstance(mappings, list) else [mappings]:
                    if not isinstance(mapping, dict):
                        raise _error("<< needs a mapping, or a list of mappings", value.start_mark)
                    merged = mapping | merged  # the first of several wins
            elif key.value in own:
                raise _error(f"the key {key.value!r} is repeated", key.start_mark)
            else:
                own[key.value] = self.of(value, depth + 1)
        return merged | own


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    text: str = node.value
    match node.tag.removeprefix(TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            if len(text) > MAX_DIGITS:
                raise _error(f"the number has more than {MAX_DIGITS} digits; quote it if it is a text", node.start_mark)
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
