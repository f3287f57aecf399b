"""Columns of tables (.csv, .jsonl, .parquet), and the prompts in one."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from fewstep.core.errors import UserError, kind_of
from fewstep.core.files import read_prompts, reading, reason_of
from fewstep.core.json_files import without_repetition

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
CAPTION_COLUMNS = ("caption", "prompt", "text")
IMAGE_COLUMNS = ("image", "img", "images", "file_name", "file", "png", "jpg", "jpeg", "webp")

T = TypeVar("T")


def read_texts(file: Path, column: str | None = None, setting: str | None = None) -> list[str]:
    """The prompts or captions of a text file, one per line, or of a table: those of ``column``, by default of the only
    one that is called caption, prompt or text. Raises ``UserError`` that names the line or row of one that is missing,
    empty or longer than a line."""
    if file.suffix.lower() in TABLE_SUFFIXES:
        return [text for (text,) in read_captioned(file, (), column, setting)]
    if column is not None:
        raise UserError(f"{file} is a text file of prompts, without columns: leave the column out.")
    return read_prompts(file)


def read_captioned(
    file: Path, others: Sequence[str], column: str | None = None, setting: str | None = None
) -> list[tuple[str, ...]]:
    """The cells of the columns ``others`` and, last, the caption (see ``read_texts``), row by row."""
    caption = choose_column(str(file), table_columns(file), column, CAPTION_COLUMNS, "caption", setting=setting)
    rows = read_table(file, (*others, str(caption)))
    for number, (*_, text) in enumerate(rows, start=1):
        if len(text.strip().splitlines()) != 1:
            raise UserError(f"{file}, row {number}: a caption must be one line.")
    return [(*cells, text.strip()) for *cells, text in rows]


def read_table(file: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The cells of these columns, row by row, of a table: .csv with a header or .jsonl with one object per line, both
    in UTF-8, or .parquet. Other columns and empty lines are ignored. Raises ``UserError`` that names a row that is
    damaged, lacks one of the columns or has more cells than the header, and if there are no rows or a column appears
    twice."""
    rows = []
    for number, cells in enumerate(read_cells(file, columns), start=1):
        for column, cell in zip(columns, cells, strict=True):
            if cell is not None and not isinstance(cell, str):
                raise UserError(f"{file}, row {number}: the {column} must be a text, not {kind_of(cell)}.")
        if not all(isinstance(cell, str) and cell.strip() for cell in cells):
            raise UserError(f"{file}, row {number} has no {' or no '.join(columns)}.")
        rows.append(tuple(map(str, cells)))
    if not rows:
        raise UserError(f"{file} contains no {columns[-1]}s.")
    return rows


def read_cells(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The same for cells of any type, None if they are missing: texts of .csv, JSON values of .jsonl."""

    def cells(row: Any) -> tuple[Any, ...]:
        found = tuple(row.get(name) if isinstance(row, dict) else None for name in columns)
        "".join(cell for cell in found if isinstance(cell, str)).encode()  # a lone surrogate raises ValueError
        return found

    return _readable(file, map(cells, _table_rows(file, columns)))


def _readable(file: Path, rows: Iterator[T]) -> Iterator[T]:
    """The rows. Raises ``UserError`` that names one that is damaged."""
    number = 1
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:  # on damaged bytes parsers raise exceptions of almost every type
        raise UserError(f"{file}, row {number} is not readable ({reason_of(error)}). Correct it.") from error


def table_columns(file: Path) -> list[str]:
    """The names of a table's columns (see ``read_table``), of a .jsonl file those of all rows. Raises ``UserError`` if
    it cannot be read."""
    with reading(file, "table (.csv, .jsonl or .parquet)"):
        if file.suffix.lower() == ".parquet":
            return list(_parquet(file).schema_arrow.names)
        if file.suffix.lower() == ".csv":
            return list(csv.DictReader(_text_lines(file), strict=True).fieldnames or ())
        rows = (row for row in _readable(file, _json_rows(_text_lines(file))) if isinstance(row, dict))
        return list(dict.fromkeys(name for row in rows for name in row))


def _table_rows(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    with reading(file, "table (.csv, .jsonl or .parquet)"):
        if file.suffix.lower() == ".parquet":
            table = _parquet(file)
            return iter(table.read([name for name in columns if name in table.schema_arrow.names]).to_pylist())
        lines = _text_lines(file)
    return _csv_rows(lines, columns) if file.suffix.lower() == ".csv" else _json_rows(lines)


def _parquet(file: Path) -> Any:
    if find_spec("pyarrow") is None:
        raise UserError(f"{file}: Parquet needs an extra: pip install 'fewstep[data]'.")
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


def _text_lines(file: Path) -> Iterator[str]:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    return (line.decode("utf-8") for line in content.splitlines(keepends=True))


def _csv_rows(lines: Iterator[str], columns: Sequence[str]) -> Iterator[dict[str | None, Any]]:
    reader = csv.DictReader(lines, strict=True)
    if twice := [name for name in columns if (reader.fieldnames or ()).count(name) > 1]:
        raise ValueError(f"the header has {twice[0]} twice")
    for row in reader:
        if None in row:
            raise ValueError("it has more cells than the header: put a text with commas in double quotes")
        yield row


def _json_rows(lines: Iterator[str]) -> Iterator[Any]:
    return (json.loads(line, object_pairs_hook=without_repetition) for line in lines if line.strip())


def choose_column(
    where: str, present: Iterable[str], wanted: str | None, usual: Sequence[str], kind: str, *, required: bool = True,
    setting: str | None = None,
) -> str | None:  # fmt: skip
    """The column ``wanted``, or else the only one that has one of the ``usual`` names. Raises ``UserError`` that lists
    the columns if there is none, unless it is not ``required``, or if there are several; ``setting`` is what names the
    column (``--column``), None where nothing does."""
    present = list(present)
    if not present and (required or wanted is not None):
        raise UserError(f"{where} has no columns: it is empty.")
    if wanted is not None:
        if wanted not in present:
            raise UserError(f"{where} has no column {wanted!r}; its columns are {', '.join(present)}.")
        return wanted
    found = [name for name in present if name in usual]
    if len(found) > 1 or (required and not found):
        problem = f"several columns that may be the {kind}" if found else f"no column called {' or '.join(usual)}"
        rename = "Rename or remove all but one of them." if found else f"Rename that of the {kind} to {usual[0]}."
        advice = rename if setting is None else f"Name that of the {kind}: {setting}."
        raise UserError(f"{where} has {problem}; its columns are {', '.join(present)}. {advice}")
    return found[0] if found else None
