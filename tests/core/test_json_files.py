"""JSON files are read with clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.core.errors import UserError
from fewstep.core.json_files import read_json, read_json_lines, read_json_object


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '[{"rows": [{"a": null, "a": 2}]}]'])
def test_a_repeated_key_is_refused_at_any_depth(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json.*the key 'a' is repeated"):
        read_json(tmp_path / "x.json")


def test_an_object_is_required_where_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("3")
    with pytest.raises(UserError, match=r"x\.json must contain a JSON object, not a number"):
        read_json_object(tmp_path / "x.json")


def test_half_a_line_is_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a":')
    assert read_json_lines(tmp_path / "x.jsonl") == ([{"a": 1}, {"a": 2}], 1)
