"""Files of JSON as a table, every fault of which is told with its line.

Arrow's own reader takes strings that look like dates for dates, and gives every message in a column
the fields of all others. Here a string stays one, and a list or object comes back as it was.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

_KINDS = {str: "text", bool: "true or false", int: "whole numbers", float: "numbers"}
_NESTED, _NOTHING = "lists or objects", "nothing"
_TYPES = {
    "text": pa.string(),
    "true or false": pa.bool_(),
    "whole numbers": pa.int64(),
    "numbers": pa.float64(),
    _NESTED: pa.json_(),
    _NOTHING: pa.null(),
}
# Rows that become Arrow's at a time.
_AT_ONCE = 10_000


def table(files: Sequence[Path]) -> pa.Table:
    """The rows of files with one JSON object per line, or of .json files with one array of them.

    Columns that a row lacks are null in it. Blank lines are no rows.

    Raises:
        ValueError: A line is no object, or a column has values of two kinds.
    """
    kinds: dict[str, str] = {}
    for where, row in _rows(files):
        for column, value in row.items():
            kinds[column] = _kind(value, kinds.get(column, _NOTHING), f"{where}, column {column!r}")
    schema = pa.schema({column: _TYPES[kind] for column, kind in kinds.items()})
    nested = [column for column, kind in kinds.items() if kind == _NESTED]
    rows = (_stored(row, nested) for _, row in _rows(files))
    tables = [schema.empty_table()]
    while part := list(itertools.islice(rows, _AT_ONCE)):
        tables.append(pa.Table.from_pylist(part, schema=schema))
    return pa.concat_tables(tables)


def _kind(value: Any, before: str, where: str) -> str:
    """What a column holds, given another value of it."""
    if value is None:
        return before
    kind = _KINDS.get(type(value), _NESTED)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {value} has more than 64 bits. Write it as text.")
    if {kind, before} == {"whole numbers", "numbers"}:
        return "numbers"
    if before not in (kind, _NOTHING):
        raise ValueError(
            f"{where} holds {kind}, and in earlier rows {before}. Give every column one kind."
        )
    return kind


def _stored(row: dict[str, Any], nested: Sequence[str]) -> dict[str, Any]:
    given = [column for column in nested if row.get(column) is not None]
    return row | {column: json.dumps(row[column], ensure_ascii=False) for column in given}


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, and what errors call its place."""
    for file in files:
        entries = _entries(file) if _holds_array(file) else _lines(file)
        for where, entry in entries:
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{where} is a JSON {type(entry).__name__}, no object. Write each row as "
                    f'{{"column": value, ...}}.'
                )
            yield where, entry


def _holds_array(file: Path) -> bool:
    with _opened(file) as lines:
        first = next((line.lstrip()[:1] for line in lines if line.strip()), b"")
    if not first:
        raise ValueError(f"{file} is empty. Give a file with at least one row.")
    return first == b"[" and file.suffix == ".json"


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    with _opened(file) as content:
        entries = _parsed(content.read(), str(file))
    for number, entry in enumerate(entries):
        yield f"{file}: entry {number}", entry


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", _parsed(line.strip(), f"{file}:{number}")


def _opened(file: Path) -> BinaryIO:
    """The file, from behind the byte order mark on that some editors write."""
    content = file.open("rb")
    if content.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        content.seek(0)
    return content


def _parsed(content: bytes, where: str) -> Any:
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
        if b"\\ud" in content or b"\\uD" in content:
            # Half of a pair of escapes is no character; this raises.
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.lineno > 1:
            where = f"{where}:{error.lineno}"
        raise ValueError(f"{where} is not JSON ({error}). Mend or remove that line.") from error
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
