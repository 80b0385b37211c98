"""Readers of data files into Arrow tables, whose errors name the file and line.

Files are read anew every time: a cache that looks at names and times of modification, as that of
`datasets` does, returns rows of a file that was replaced.

CSV readers of other libraries guess types from the values: an answer `4,5` becomes 45, `NA`
becomes null, and integer labels become floats once one is missing. Here every cell is the text of
the file. JSON columns have one type each, which all rows must share.
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
import pyarrow.parquet as pq

from jlora.checkpoints.safetensors_io import format_names

# Limit of the csv module for the characters of a cell; its default is 131,072.
_MAX_CELL_CHARS = 2**31 - 1

# Rows converted to Arrow at a time.
_ROWS_PER_CHUNK = 10_000


def read_csv_table(files: Sequence[Path]) -> pa.Table:
    """Returns the rows of CSV files with a header line of the same columns; skips blank lines.

    Raises:
        ValueError: If the number of cells in a line is not that of the columns, or a file is not
            CSV in UTF-8.
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
                f"{file} has the columns {format_names(header, 20)}, but {files[0]} has "
                f"{format_names(columns, 20)}. Use files with the same columns."
            )
        rows = _iter_csv_rows(file, header)
        while part := list(itertools.islice(rows, _ROWS_PER_CHUNK)):
            cells = dict(zip(header, zip(*part, strict=True), strict=True))
            tables.append(pa.table(cells, schema=schema))
    return pa.concat_tables(tables)


def _read_csv_header(file: Path) -> list[str]:
    """Returns the names of a file's columns."""
    _, names = next(_iter_csv_lines(file), (0, []))
    if not names:
        raise ValueError(f"{file} is empty. Use a file with at least one row.")
    separator = find_other_separator(names)
    if separator is not None:
        raise ValueError(
            f"{file}: the first line separates its columns by {separator!r}. Save the file with "
            f"commas."
        )
    if len(set(names)) != len(names):
        raise ValueError(
            f"{file}: the first line names columns twice: {format_names(names, 20)}. Rename them."
        )
    return names


def find_other_separator(names: Sequence[str]) -> str | None:
    """Returns the character that separates names in one column, as spreadsheets write; or None."""
    return next((mark for mark in ";\t|" if mark in names[0]), None) if len(names) == 1 else None


def _iter_csv_rows(file: Path, header: Sequence[str]) -> Iterator[list[str]]:
    """Yields the cells of every row after the header."""
    for number, cells in itertools.islice(_iter_csv_lines(file), 1, None):
        if len(cells) != len(header):
            raise ValueError(
                f"{file}:{number} has {len(cells)} cells, but the first line names {len(header)} "
                f"columns. Correct or remove the row; quote text that contains commas."
            )
        yield cells


def _iter_csv_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the last line and the cells of every row that is not blank."""
    with file.open(encoding="utf-8-sig", newline="") as content:
        reader = csv.reader(content, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(
                f"{file}:{reader.line_num} is not valid CSV ({error}). Correct that line."
            ) from error
        except UnicodeDecodeError as error:  # Decoding works on blocks: the line is unknown.
            raise ValueError(f"{file} is not UTF-8 ({error}). Save it in UTF-8.") from error


def read_text_table(files: Sequence[Path]) -> pa.Table:
    """Returns the lines of text files in the column `text`, without their line ends.

    Raises:
        ValueError: A file is not UTF-8, or there is no line.
    """
    schema = pa.schema({"text": pa.string()})
    tables = []
    for file in files:
        # Some editors begin a text with a byte order mark, which does not belong to it.
        with file.open(encoding="utf-8-sig") as content:
            while part := list(itertools.islice(content, _ROWS_PER_CHUNK)):
                lines = [line.removesuffix("\n") for line in part]
                tables.append(pa.table({"text": lines}, schema=schema))
    if not tables:
        raise ValueError("there is no line")
    return pa.concat_tables(tables)


def read_parquet_table(files: Sequence[Path]) -> pa.Table:
    """Returns the rows of Parquet files, in the columns and types of the first file.

    Raises:
        ValueError: A file has other columns, or a value does not fit the type of its column.
        OSError: A file is damaged.
    """
    tables: list[pa.Table] = []
    for file in files:
        table = pq.ParquetFile(file).read()
        first = tables[0] if tables else table
        if set(table.column_names) != set(first.column_names):
            raise ValueError(
                f"{file} has the columns {format_names(table.column_names, 20)}, but {files[0]} "
                f"has {format_names(first.column_names, 20)}"
            )
        tables.append(table.select(first.column_names).cast(first.schema))
    return pa.concat_tables(tables)


_KIND_BY_PYTHON_TYPE = {str: "text", bool: "booleans", int: "integers", float: "floats"}

# Every column is an array of all rows, mostly of nulls where rows have different columns.
_MAX_COLUMNS = 2_000

_NESTED_KIND, _NULL_KIND = "lists or objects", "nulls"

_ARROW_TYPE_BY_KIND = {
    "text": pa.string(),
    "booleans": pa.bool_(),
    "integers": pa.int64(),
    "floats": pa.float64(),
    _NESTED_KIND: pa.json_(),
    _NULL_KIND: pa.null(),
}


def read_json_table(files: Sequence[Path]) -> pa.Table:
    """Returns the rows of files with one JSON object per line, or of .json files with one array.

    Columns missing from a row are null. Blank lines are skipped.

    Raises:
        ValueError: If a line is not an object, a column has values of two types, or there are more
            than 2,000 columns.
    """
    kinds: dict[str, str] = {}
    for location, row in _iter_json_rows(files):
        if len(kinds.keys() | row.keys()) > _MAX_COLUMNS:
            raise ValueError(
                f"{location}: up to here, the rows have more than {_MAX_COLUMNS:,} different "
                f"columns. Nest the values under one column, or leave them out."
            )
        for column, value in row.items():
            kinds[column] = _update_column_kind(
                value, kinds.get(column, _NULL_KIND), f"{location}, column {column!r}"
            )
    schema = pa.schema({column: _ARROW_TYPE_BY_KIND[kind] for column, kind in kinds.items()})
    nested = [column for column, kind in kinds.items() if kind == _NESTED_KIND]
    rows = (_encode_nested_columns(row, nested) for _, row in _iter_json_rows(files))
    tables = [schema.empty_table()]
    while part := list(itertools.islice(rows, _ROWS_PER_CHUNK)):
        tables.append(pa.Table.from_pylist(part, schema=schema))
    return pa.concat_tables(tables)


def _update_column_kind(value: Any, known_kind: str, location: str) -> str:
    """Returns the type of a column after one more value."""
    if value is None:
        return known_kind
    kind = _KIND_BY_PYTHON_TYPE.get(type(value), _NESTED_KIND)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{location}: {value} exceeds 64 bits. Write it as text.")
    if {kind, known_kind} == {"integers", "floats"}:
        return "floats"
    if known_kind not in (kind, _NULL_KIND):
        raise ValueError(
            f"{location} contains {kind}, but {known_kind} in earlier rows. Use one "
            f"type per column."
        )
    return kind


def _encode_nested_columns(row: dict[str, Any], nested_columns: Sequence[str]) -> dict[str, Any]:
    present = [column for column in nested_columns if row.get(column) is not None]
    return row | {column: json.dumps(row[column], ensure_ascii=False) for column in present}


def _iter_json_rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every row with its location for errors."""
    for file in files:
        entries = _iter_json_array(file) if _is_json_array(file) else _iter_json_lines(file)
        for location, entry in entries:
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{location} must be a JSON object, got {type(entry).__name__}. Write each "
                    f'row as {{"column": value, ...}}.'
                )
            yield location, entry


def _is_json_array(file: Path) -> bool:
    with _open_after_bom(file) as lines:
        first = next((line.lstrip()[:1] for line in lines if line.strip()), b"")
    if not first:
        raise ValueError(f"{file} is empty. Use a file with at least one row.")
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
    """Returns the open file, positioned after the byte order mark that some editors write."""
    content = file.open("rb")
    if content.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        content.seek(0)
    return content


def _parse_json(content: bytes, location: str) -> Any:
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_reject_json_constant)
        if b"\\ud" in content or b"\\uD" in content:
            # Raises for a lone surrogate, which is not a character.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.lineno > 1:
            location = f"{location}:{error.lineno}"
        raise ValueError(
            f"{location} is not JSON ({error}). Correct or remove that line."
        ) from error
    return value


def _reject_json_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
