"""Rows of a local file, one at a time, with every fault named by file and line."""

import csv
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llama_lab.choices import DataFormat
from llama_lab.config import DatasetSettings
from llama_lab.data.formats import detect_format, to_example
from llama_lab.errors import DataError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

CHECKED_ROWS = 50_000
"""So many rows are read before the run starts; reading them takes about a second."""


MAX_CSV_FIELD = 2**31 - 1
"""Characters; Python's own limit of 131,072 is shorter than a long document."""


def expanded(path: str) -> Path:
    """The path with ~ replaced; as it is where ~ names nobody's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_file(path: Path, dataset: DatasetSettings) -> DataFormat:
    """Read the file's first rows as training will, and refuse what cannot be trained on; the format of the rows.

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
    if num_rows < 2 or form is None:
        raise DataError(
            f"{path} holds {'one row' if num_rows else 'no rows'}; a run needs at least two, one of them held out."
        )
    return form


def _check_path(path: Path) -> None:
    if os.path.isdir(path):
        raise DataError(f"dataset.path={path} is a folder. Name one file in it.")
    if not os.path.exists(path):  # pathlib raises where a name is too long
        beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK | os.X_OK) else []
        hint = did_you_mean(path.name, beside, f"{path.parent / '{}'}")
        raise DataError(f"dataset.path={path}: there is no such file.{hint or ' Check the folder and the spelling.'}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"dataset.path={path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; a run needs at least two rows.")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL, JSON, CSV or Parquet file in file order.

    Raises:
        DataError: what cannot be read, with the line where that is known.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_first_bad_line(path)} is not UTF-8: {error.reason}. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                hint = " Is it one JSON list? Then name it .json." if number == 1 and line.lstrip()[0] == "[" else ""
                raise DataError(
                    f"{path}, line {number} is not JSON: {error.msg} (column {error.colno}).{hint}"
                ) from None
            except RecursionError:
                raise DataError(f"{path}, line {number} is nested too deeply to be a row.") from None
            yield _as_row(row, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        hint = " If every line is a row of its own, name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno} is not JSON: {error.msg} (column {error.colno}).{hint}") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to be a list of rows.") from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds no list of rows. It must be a list of objects, or an object with a list `data`; "
            "if every line is a row of its own, name it .jsonl."
        )
    for number, row in enumerate(rows, 1):
        yield _as_row(row, f"{path}, row {number}")


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_header(list(reader.fieldnames or []), path)
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or [])
                    raise DataError(
                        f"{path}, line {reader.line_num} has not the {wanted} fields of the first line. "
                        "Put a value with a comma in it into double quotes."
                    )
                yield row
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.reader.line_num} is not CSV: {error}. Is a quote not closed?"
            ) from None


def _check_header(names: list[str], path: Path) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}, line 1 names the column {twice[0]} twice. Give each column a name of its own.")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def _first_bad_line(path: Path) -> int:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError:
                return number
    return 0


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{where} is no JSON object. A row reads {{"prompt": "...", "completion": "..."}}.')
    return row
