"""Rows of a local file, one at a time, with every fault named by file and line."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llama_lab.config import DatasetSettings
from llama_lab.data.formats import detect_format, to_example
from llama_lab.errors import DataError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

CHECKED_ROWS = 50_000
"""So many rows are read before the run starts; reading them takes about a second."""


def check_file(path: Path, dataset: DatasetSettings) -> None:
    """Read the file's first rows as training will, and refuse what cannot be trained on.

    Raises:
        DataError: the file is missing, unreadable, empty, malformed, or its columns do not fit the format.
    """
    _check_path(path)
    num_rows, form = 0, None
    for number, row in enumerate(islice(read_rows(path), CHECKED_ROWS), 1):
        try:
            form = form or detect_format(row, dataset)
            to_example(row, form, dataset)
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from None
        num_rows = number
    if num_rows < 2:
        raise DataError(
            f"{path} holds {'one row' if num_rows else 'no rows'}; a run needs at least two, one of them held out."
        )


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"dataset.path={path} is a folder. Name one file in it.")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"dataset.path={path}: there is no such file.{did_you_mean(path.name, beside)}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"dataset.path={path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL, JSON, CSV or Parquet file in file order.

    Raises:
        DataError: what cannot be read, with the line where that is known.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = " Is it one JSON list? Then name it .json." if number == 1 and line.lstrip()[0] == "[" else ""
                raise DataError(
                    f"{path}, line {number} is not JSON: {error.msg} (column {error.colno}).{hint}"
                ) from None
            yield _as_row(row, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        hint = " If every line is a row of its own, name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno} is not JSON: {error.msg} (column {error.colno}).{hint}") from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f"{path} holds one JSON object. It must be a list of objects, or an object with a list `data`.")
    for number, row in enumerate(rows, 1):
        yield _as_row(row, f"{path}, row {number}")


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or [])
                    raise DataError(f"{path}, line {reader.line_num} has not the {wanted} fields of the first line.")
                yield row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}.") from None


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{where} is no JSON object. A row reads {{"prompt": "...", "completion": "..."}}.')
    return row
