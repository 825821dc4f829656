"""Bytes to rows: the readers of every kind of file, each of them one row at a time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llama_lab.data.json_rows import Row, read_json, read_jsonl
from llama_lab.errors import DataError

MAX_CSV_FIELD = 2**31 - 1
"""Characters; Python's own limit of 131,072 is shorter than a long document."""

PARQUET_MAGIC = b"PAR1"
"""With these bytes a Parquet file begins and ends."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a data file in file order; its ending names the kind.

    Raises:
        DataError: what cannot be read, with the line where that is known.
    """
    for row in scan_rows(path):
        if isinstance(row, DataError):
            raise DataError(f"{path}, {row}")
        yield row


def scan_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file; one that cannot be read is a DataError in its place, and those after it follow.

    Raises:
        DataError: the file cannot be read at all.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except DataError as error:
        raise DataError(f"{path}{' ' if str(error).startswith('holds') else ', '}{error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}{_not_utf8(path, error)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; quotes may hold delimiters and line breaks (RFC 4180)."""
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            start = lines.line_num + 1
            try:
                fields = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield DataError(_no_csv(error, start, lines.line_num))
                continue
            if not fields:
                continue
            if names:
                yield _csv_row(names, fields, f"line {start}")
            else:
                names = fields
                _check_header(names, f"line {start}", delimiter)


def _csv_row(names: list[str], fields: list[str], where: str) -> Row:
    if len(fields) != len(names):
        values = "1 value" if len(fields) == 1 else f"{len(fields)} values"
        return DataError(
            f"{where} has {values}, and the first line names {len(names)} columns. "
            "Put a value with a comma or a tab in it into double quotes."
        )
    if any("\0" in field for field in fields):
        return DataError(f"{where} holds NUL bytes: it was not written whole, or is no text. Write it again.")
    return dict(zip(names, fields, strict=True))


def _no_csv(error: csv.Error, start: int, end: int) -> str:
    if "unexpected end" in str(error):
        return f"line {start} opens a quote that no line up to the end, line {end}, closes. Close it, or double it."
    return f"line {start} is not CSV: {error}. A quote inside a quoted value is written twice."


def _check_header(names: list[str], where: str, delimiter: str) -> None:
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(
                f"{where} gives column {number} no name. Name it, or leave the column out "
                "(pandas writes none with index=False)."
            )
        if names.count(name) > 1:
            raise DataError(f"{where} names the column {name} twice. Give each column a name of its own.")
    if len(names) == 1 and (other := next((sign for sign in ";\t," if sign in names[0] and sign != delimiter), None)):
        wanted = "commas" if delimiter == "," else "tabs"
        hint = " Name the file .tsv." if other == "\t" else " Name the file .csv." if other == "," else ""
        raise DataError(f"{where} is one column, {names[0]!r}. Separate columns by {wanted}.{hint}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DataError(_no_parquet(path, str(error))) from None


def _no_parquet(path: Path, said: str) -> str:
    with path.open("rb") as file:
        begins = file.read(4) == PARQUET_MAGIC
        file.seek(max(0, path.stat().st_size - 4))
        ends = file.read(4) == PARQUET_MAGIC
    if begins and not ends:
        return "a Parquet file, breaks off: its end is missing, and with it the list of what it holds. Get it again."
    if not begins:
        return "by its name a Parquet file, is none. Name it as what it is: .jsonl, .json, .csv or .tsv."
    return f"a Parquet file, is damaged: {said.splitlines()[0].rstrip('.')}. Get it again."


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    with path.open("rb") as lines:
        if lines.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return " is UTF-16. Save it as UTF-8."
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError:
                return f", line {number} is not UTF-8: {error.reason}. Save it as UTF-8."
    return f" is not UTF-8: {error.reason}. Save it as UTF-8."


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
"""The kinds of data files by the ending of their names."""
