"""Files of CSV as a table of text, every fault of which is told with its line.

Other readers guess types from the values: an answer `4,5` becomes 45, `NA` nothing, and labels
numbers with a point once one is missing. Here every cell is the text that the file holds.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

from jlora.checkpoints.safetensors_io import format_names

# The characters of a cell that the csv module takes, which is 131,072 unless told.
_MAX_CELL_CHARS = 2**31 - 1

# Rows that become Arrow's at a time.
_CSV_ROWS_PER_CHUNK = 10_000


def read_csv_table(files: Sequence[Path]) -> pa.Table:
    """The rows of files that begin with the names of the same columns. Blank lines are no rows.

    Raises:
        ValueError: A line has more or fewer cells than there are columns, or is no CSV in UTF-8.
    """
    before = csv.field_size_limit(_MAX_CELL_CHARS)
    try:
        return _read_csv_files(files)
    finally:
        csv.field_size_limit(before)


def _read_csv_files(files: Sequence[Path]) -> pa.Table:
    columns = _read_csv_header(files[0])
    schema = pa.schema({column: pa.string() for column in columns})
    tables = [schema.empty_table()]
    for file in files:
        header = _read_csv_header(file)
        if set(header) != set(columns):
            raise ValueError(
                f"{file} has the columns {format_names(header, 20)}, and {files[0]} has "
                f"{format_names(columns, 20)}. Give files of the same columns."
            )
        rows = _iter_csv_rows(file, len(header))
        while part := list(itertools.islice(rows, _CSV_ROWS_PER_CHUNK)):
            cells = dict(zip(header, zip(*part, strict=True), strict=True))
            tables.append(pa.table(cells, schema=schema))
    return pa.concat_tables(tables)


def _read_csv_header(file: Path) -> list[str]:
    """The names of a file's columns."""
    _, names = next(_iter_csv_lines(file), (0, []))
    if not names:
        raise ValueError(f"{file} is empty. Give a file with at least one row.")
    if len(set(names)) != len(names):
        raise ValueError(
            f"{file}: the first line names columns twice: {format_names(names, 20)}. Give every column "
            f"a name of its own."
        )
    return names


def _iter_csv_rows(file: Path, num_columns: int) -> Iterator[list[str]]:
    """The cells of every row."""
    for number, cells in itertools.islice(_iter_csv_lines(file), 1, None):
        if len(cells) != num_columns:
            raise ValueError(
                f"{file}:{number} has {len(cells)} cells, and the first line names {num_columns} "
                f"columns. Mend or remove the row; text with commas in it needs quotes around it."
            )
        yield cells


def _iter_csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of every row that is not blank, and the number of its last line."""
    with file.open(encoding="utf-8-sig", newline="") as content:
        reader = csv.reader(content, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(
                f"{file}:{reader.line_num} is no CSV ({error}). Mend that line, or write the file "
                f"anew."
            ) from error
        except UnicodeDecodeError as error:  # Of a block, so the line is not known.
            raise ValueError(f"{file} is no UTF-8 ({error}). Save it anew in UTF-8.") from error


_KIND_BY_PYTHON_TYPE = {str: "text", bool: "true or false", int: "whole numbers", float: "numbers"}

_NESTED_KIND, _NULL_KIND = "lists or objects", "nothing"

_ARROW_TYPE_BY_KIND = {
    "text": pa.string(),
    "true or false": pa.bool_(),
    "whole numbers": pa.int64(),
    "numbers": pa.float64(),
    _NESTED_KIND: pa.json_(),
    _NULL_KIND: pa.null(),
}

# Rows that become Arrow's at a time.
_JSON_ROWS_PER_CHUNK = 10_000


def read_json_table(files: Sequence[Path]) -> pa.Table:
    """The rows of files with one JSON object per line, or of .json files with one array of them.

    Columns that a row lacks are null in it. Blank lines are no rows.

    Raises:
        ValueError: A line is no object, or a column has values of two kinds.
    """
    kinds: dict[str, str] = {}
    for where, row in _iter_json_rows(files):
        for column, value in row.items():
            kinds[column] = _update_column_kind(
                value, kinds.get(column, _NULL_KIND), f"{where}, column {column!r}"
            )
    schema = pa.schema({column: _ARROW_TYPE_BY_KIND[kind] for column, kind in kinds.items()})
    nested = [column for column, kind in kinds.items() if kind == _NESTED_KIND]
    rows = (_encode_nested_columns(row, nested) for _, row in _iter_json_rows(files))
    tables = [schema.empty_table()]
    while part := list(itertools.islice(rows, _JSON_ROWS_PER_CHUNK)):
        tables.append(pa.Table.from_pylist(part, schema=schema))
    return pa.concat_tables(tables)


def _update_column_kind(value: Any, known_kind: str, location: str) -> str:
    """What a column holds, given another value of it."""
    if value is None:
        return known_kind
    kind = _KIND_BY_PYTHON_TYPE.get(type(value), _NESTED_KIND)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{location}: {value} has more than 64 bits. Write it as text.")
    if {kind, known_kind} == {"whole numbers", "numbers"}:
        return "numbers"
    if known_kind not in (kind, _NULL_KIND):
        raise ValueError(
            f"{location} holds {kind}, and in earlier rows {known_kind}. Give every column one kind."
        )
    return kind


def _encode_nested_columns(row: dict[str, Any], nested_columns: Sequence[str]) -> dict[str, Any]:
    given = [column for column in nested_columns if row.get(column) is not None]
    return row | {column: json.dumps(row[column], ensure_ascii=False) for column in given}


def _iter_json_rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, and what errors call its place."""
    for file in files:
        entries = _iter_json_array(file) if _is_json_array(file) else _iter_json_lines(file)
        for where, entry in entries:
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{where} is a JSON {type(entry).__name__}, no object. Write each row as "
                    f'{{"column": value, ...}}.'
                )
            yield where, entry


def _is_json_array(file: Path) -> bool:
    with _open_after_bom(file) as lines:
        first = next((line.lstrip()[:1] for line in lines if line.strip()), b"")
    if not first:
        raise ValueError(f"{file} is empty. Give a file with at least one row.")
    return first == b"[" and file.suffix == ".json"


def _iter_json_array(file: Path) -> Iterator[tuple[str, Any]]:
    with _open_after_bom(file) as content:
        entries = _parse_json(content.read(), str(file))
    for number, entry in enumerate(entries):
        yield f"{file}: entry {number}", entry


def _iter_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with _open_after_bom(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", _parse_json(line.strip(), f"{file}:{number}")


def _open_after_bom(file: Path) -> BinaryIO:
    """The file, from behind the byte order mark on that some editors write."""
    content = file.open("rb")
    if content.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        content.seek(0)
    return content


def _parse_json(content: bytes, location: str) -> Any:
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_reject_json_constant)
        if b"\\ud" in content or b"\\uD" in content:
            # Half of a pair of escapes is no character; this raises.
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.lineno > 1:
            location = f"{location}:{error.lineno}"
        raise ValueError(f"{location} is not JSON ({error}). Mend or remove that line.") from error
    return found


def _reject_json_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
