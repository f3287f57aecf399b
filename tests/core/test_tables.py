"""Tables: captions of a column, whatever the format; what is wrong is named by row and column."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fewstep.core import tables
from fewstep.core.errors import UserError
from fewstep.core.tables import read_captioned, read_texts, table_columns

TEXTS = ["a cat, asleep", "NA", "ein Hütchen"]


def write(folder: Path, suffix: str, **columns: list[object]) -> Path:
    """A table of these columns."""
    file = folder / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        return file
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file
    quoted = [",".join('"' + str(cell or "").replace('"', '""') + '"' for cell in row.values()) for row in rows]
    file.write_text("\n".join([",".join(columns), *quoted]) + "\n", encoding="utf-8")
    return file


every_suffix = pytest.mark.parametrize("suffix", tables.TABLE_SUFFIXES)


@every_suffix
@pytest.mark.parametrize("column", tables.CAPTION_COLUMNS)
def test_captions_are_those_of_the_only_usual_column(suffix: str, column: str, tmp_path: Path) -> None:
    padded = [f" {TEXTS[0]} ", *TEXTS[1:]]
    file = write(tmp_path, suffix, id=["1", "2", "3"], **{column: padded})
    assert table_columns(file) == ["id", column]
    assert read_texts(file) == TEXTS
    assert read_texts(file, "id") == ["1", "2", "3"]
    assert read_captioned(file, ("id",)) == list(zip("123", TEXTS, strict=True))


@every_suffix
def test_a_column_that_is_missing_or_one_of_several_is_refused_with_a_list(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path, suffix, prompt=TEXTS, caption=TEXTS)
    with pytest.raises(UserError, match="several columns that may be the caption; its columns are prompt, caption"):
        read_texts(file)
    assert read_texts(file, "caption") == TEXTS
    with pytest.raises(UserError, match="has no column 'titel'; its columns are prompt, caption"):
        read_texts(file, "titel")
    with pytest.raises(UserError, match="no column called caption or prompt or text; its columns are title"):
        read_texts(write(tmp_path, suffix, title=TEXTS))


@every_suffix
@pytest.mark.parametrize(
    ("cell", "message"),
    [("", "row 2 has no caption"), (None, "row 2 has no caption"), ("a\nb", "row 2: a caption must be one line")],
)
def test_a_row_without_a_caption_of_one_line_is_named(
    suffix: str, cell: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_texts(write(tmp_path, suffix, caption=["a", cell, "c"]))


@every_suffix
def test_damaged_and_empty_tables_are_named(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match=rf"a\{suffix} does not exist"):
        read_texts(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"a\{suffix}"):
        read_texts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=rf"a\{suffix}"):
        read_texts(file)


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("caption,file\na cat\n")
    assert read_texts(tmp_path / "a.txt") == ["caption,file", "a cat"]
    with pytest.raises(UserError, match="without columns"):
        read_texts(tmp_path / "a.txt", "caption")


def test_parquet_needs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, ".parquet", text=TEXTS)
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Parquet needs an extra: pip install 'fewstep\[data\]'"):
        read_texts(file)


def test_advice_on_columns_is_what_can_be_done(tmp_path: Path) -> None:
    two, other = write(tmp_path, ".csv", prompt=TEXTS, text=TEXTS), write(tmp_path, ".jsonl", title=TEXTS)
    with pytest.raises(UserError, match=r"Name that of the caption: --column NAME\."):
        read_texts(two, setting="--column NAME")
    with pytest.raises(UserError, match="Rename or remove all but one of them"):
        read_texts(two)
    with pytest.raises(UserError, match="Rename that of the caption to caption"):
        read_texts(other)


def test_the_columns_of_json_lines_are_those_of_all_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": 1}\n{"id": 2, "caption": "a cat"}\n')
    assert table_columns(file) == ["id", "caption"]
    with pytest.raises(UserError, match="row 1 has no caption"):
        read_texts(file)
    file.write_text('{"caption": "a cat"}\n{"prompt": "a dog"}\n')
    with pytest.raises(UserError, match="several columns that may be the caption"):
        read_texts(file)
    file.write_text("\n")
    with pytest.raises(UserError, match=r"a.jsonl has no columns: it is empty\."):
        read_texts(file)
    file.write_text('{"caption": "a cat"}\n{"caption": \n')
    with pytest.raises(UserError, match="row 2 is not readable"):
        read_texts(file)


def test_a_row_with_a_repeated_name_is_refused(tmp_path: Path) -> None:
    """JSON's own rule, the last one counts, would train on one of two labels without a word."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"caption": "a"}\n{"caption": "a", "caption": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, row 2 is not readable \(the key 'caption' is repeated\)"):
        read_texts(file)


@pytest.mark.parametrize(("cell", "kind"), [(5, "a number"), (["a"], "a list"), (True, "true or false")])
def test_a_caption_that_is_there_but_is_no_text_is_not_called_missing(tmp_path: Path, cell: object, kind: str) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"caption": cell}))
    with pytest.raises(UserError, match=f"row 1: the caption must be a text, not {kind}"):
        read_texts(file)
