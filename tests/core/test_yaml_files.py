"""YAML is read by the core rules of YAML 1.2, within limits, and mistakes are named by file and line."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from fewstep.core.errors import UserError
from fewstep.core.yaml_files import MAX_BYTES, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # the examples of section 10.3.2 of the specification
        ("[null, ~, NULL]", [None] * 3),
        ("[true, True, false, FALSE]", [True, True, False, False]),
        ("[0, 0o7, 0x3A, -19]", [0, 7, 58, -19]),
        ("[0., -0.0, .5, +12e03, -2E+05]", [0.0, -0.0, 0.5, 12000.0, -200000.0]),
        ("[.inf, -.Inf, +.INF]", [math.inf, -math.inf, math.inf]),
        # numbers without a point in YAML 1.1 are texts, in the core schema numbers
        ("[1e-4, 3E2]", [1e-4, 300.0]),
        # what only YAML 1.1 reads as something else than text, or as another number
        ("[yes, No, on, OFF, y]", ["yes", "No", "on", "OFF", "y"]),
        ("[1:30, 2020-13-45, 2020-01-01, 1_000]", ["1:30", "2020-13-45", "2020-01-01", "1_000"]),
        ("[010, 0b1, tRue]", [10, "0b1", "tRue"]),
        ("['1', \"true\", '~']", ["1", "true", "~"]),
        ("1: a\ntrue: b", {"1": "a", "true": "b"}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("d: {c: 3, <<: [{b: 1}, {b: 2, e: 4}]}", {"d": {"b": 1, "e": 4, "c": 3}}),
        ("'<<': 1", {"<<": 1}),
        ("", None),
        ("# only a comment", None),
    ],
)
def test_scalars_and_keys_follow_the_core_rules_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "a.yaml")
    assert found == value
    assert repr(found) == repr(value)  # 1 and True are equal, and so are 0.0 and -0.0


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml(".nan", "a.yaml"))


def bomb(levels: int) -> str:
    """Every level lists the one before ten times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nout: x\nseed: 2", "line 3: the key 'seed' is repeated"),
        ("a: {b: 1,\n b: 2}", "line 2: the key 'b' is repeated"),
        ("a: 1\nb: !!int x", "line 2: the tag tag:yaml.org,2002:int is not supported"),
        ("!!python/object:os.system {}", "the tag tag:yaml.org,2002:python/object:os.system is not supported"),
        ("a: !x 1", "the tag !x is not supported"),
        ("a:\n b: [\n" + "[" * 100_000, "line 3: more than 50 levels"),
        ("- " * 3_000 + "1", "more than 50 levels"),
        ("? " * 3_000 + "1", "more than 50 levels"),
        ("[" + "1," * 30_000 + "]", "more than 20,000 values"),
        (bomb(9), "its aliases stand for more than 20,000 values"),
        ("a: &a [*a]", "its aliases stand for more than 20,000 values"),
        ("a: &a {b: *a}", "its aliases stand for more than 20,000 values"),
        ("x: 1\nseed: " + "9" * 5_000, "line 2: the number has more than 18 digits"),
        ("? [a, b]\n: 1", "a key must be a text"),
        ("a: {<<: 3}", "<< needs a mapping"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: 1\nb: [1, 2", "line 2: "),
        ("a: 1\n\tb: 2", "line 2: "),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("a: 1\nb: \0", "line 2 has a character that YAML forbids"),
        ('a: "\\UFFFFFFFF"', "is not valid YAML"),
    ],
)
def test_what_is_refused_is_named_by_file_and_line(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "a.yaml")
    assert str(caught.value).startswith("a.yaml")
    assert message in str(caught.value)
    assert time.monotonic() - started < 30  # an alias bomb of nine levels would take hours


def test_files_that_are_missing_too_large_or_not_utf_8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(UserError, match=r"a\.yaml does not exist"):
        read_yaml(file)
    file.write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"a\.yaml is not a readable YAML file \('utf-8' codec can't decode byte 0xff"):
        read_yaml(file)
    file.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=r"a\.yaml is larger than"):
        read_yaml(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\n")  # as Windows' editors save it
    assert read_yaml(file) == {"a": 1}


@pytest.mark.parametrize(
    "text", ["1e4", "12e4567", "0o17", "yes", "1:30", "010", "null", "", "<<", "a: b", "2020-01-01"]
)
def test_texts_that_look_like_something_else_survive_being_written(text: str) -> None:
    assert parse_yaml(dump_yaml({"z": text, "a": [1e-5, 3, None, True]}), "a") == {
        "z": text,
        "a": [1e-5, 3, None, True],
    }
