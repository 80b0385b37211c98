"""Files of CSV as a table of text, every fault of which is told with its line.

Other readers guess types from the values: an answer `4,5` becomes 45, `NA` nothing, and labels
numbers with a point once one is missing. Here every cell is the text that the file holds.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from jlora.checkpoints.tensors import listed

# The characters of a cell that the csv module takes, which is 131,072 unless told.
_LONGEST = 2**31 - 1
# Rows that become Arrow's at a time.
_AT_ONCE = 10_000


def table(files: Sequence[Path]) -> pa.Table:
    """The rows of files that begin with the names of the same columns. Blank lines are no rows.

    Raises:
        ValueError: A line has more or fewer cells than there are columns, or is no CSV in UTF-8.
    """
    before = csv.field_size_limit(_LONGEST)
    try:
        return _table(files)
    finally:
        csv.field_size_limit(before)


def _table(files: Sequence[Path]) -> pa.Table:
    columns = _header(files[0])
    schema = pa.schema({column: pa.string() for column in columns})
    tables = [schema.empty_table()]
    for file in files:
        header = _header(file)
        if set(header) != set(columns):
            raise ValueError(
                f"{file} has the columns {listed(header, 20)}, and {files[0]} has "
                f"{listed(columns, 20)}. Give files of the same columns."
            )
        rows = _rows(file, len(header))
        while part := list(itertools.islice(rows, _AT_ONCE)):
            cells = dict(zip(header, zip(*part, strict=True), strict=True))
            tables.append(pa.table(cells, schema=schema))
    return pa.concat_tables(tables)


def _header(file: Path) -> list[str]:
    """The names of a file's columns."""
    _, names = next(_lines(file), (0, []))
    if not names:
        raise ValueError(f"{file} is empty. Give a file with at least one row.")
    if len(set(names)) != len(names):
        raise ValueError(
            f"{file}: the first line names columns twice: {listed(names, 20)}. Give every column "
            f"a name of its own."
        )
    return names


def _rows(file: Path, columns: int) -> Iterator[list[str]]:
    """The cells of every row."""
    for number, cells in itertools.islice(_lines(file), 1, None):
        if len(cells) != columns:
            raise ValueError(
                f"{file}:{number} has {len(cells)} cells, and the first line names {columns} "
                f"columns. Mend or remove the row; text with commas in it needs quotes around it."
            )
        yield cells


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
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
