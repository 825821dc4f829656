"""Rows to examples, one at a time: the format is read from the first rows, and every row has its outcome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.data.formats import convert, detect_format, is_empty
from llama_lab.data.json_rows import BrokenOff, Row
from llama_lab.data.preference import check_trainer
from llama_lab.data.readers import scan_rows
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError

FIRST_ROWS = 20
"""So many rows tell the format."""


@dataclass(slots=True)
class Located:
    """A row, and where it stands."""

    source: str
    """The file, or the split of the hub's data set."""
    number: int
    """In there, counted from 1."""
    row: Row


@dataclass(slots=True)
class Outcome:
    """What became of a row."""

    example: dict[str, Any] | None
    """None: the row is left out."""
    fault: str | None = None
    """Why it cannot be used; None where it can, or where there is nothing in it."""
    trimmed: bool = False
    """Turns without an answer or a question were left out."""
    is_row: bool = True
    """False: `fault` says where a file breaks off and what was dropped."""


def rows_of(files: Iterable[Path], limit: int | None = None) -> Iterator[Located]:
    """The rows of several files one after the other, at most `limit`."""
    located = (Located(str(file), n, row) for file in files for n, row in enumerate(scan_rows(file), 1))
    return islice(located, limit)


def convert_rows(
    rows: Iterable[Located],
    dataset: DatasetSettings,
    trainer: TrainerName = TrainerName.sft,
    form: DataFormat | None = None,
) -> tuple[DataFormat | None, Iterator[Outcome]]:
    """The format of the rows, None where there are none, and the outcome of each as it is read.

    Args:
        form: where it is known already.
    Raises:
        DataError: the columns fit no format, or not the trainer; without dataset.skip_bad_rows also a row of no use.
    """
    rows = iter(rows)
    head, readable = _first_of(rows, dataset)
    if readable:
        first = [located.row for located in readable if isinstance(located.row, dict)]
        try:
            form = form or detect_format(first[0], dataset, first[1:])
            check_trainer(form, trainer, first[0], dataset)
        except DataError as error:
            raise DataError(f"{_told(readable[0], error)}{_about_first_line(readable[0])}") from None
    # without a readable row there is no format, and no row either that would be asked for it
    return form, (_outcome(located, form or DataFormat.text, dataset) for located in chain(head, rows))


def _first_of(rows: Iterator[Located], dataset: DatasetSettings) -> tuple[list[Located], list[Located]]:
    """The rows up to the last of the first that can be read, and those of them that can."""
    head, readable = [], []
    for located in rows:
        head.append(located)
        if isinstance(located.row, dict):
            readable.append(located)
        elif not dataset.skip_bad_rows:
            break  # it will be told
        if len(readable) == FIRST_ROWS:
            break
    return head, readable


def _outcome(located: Located, form: DataFormat, dataset: DatasetSettings) -> Outcome:
    try:
        if isinstance(located.row, DataError):
            raise located.row
        if is_empty(located.row, form, dataset):
            return Outcome(None)
        example, was_trimmed = convert(located.row, form, dataset)
        return Outcome(example, trimmed=was_trimmed)
    except DataError as error:
        if dataset.skip_bad_rows:
            is_row = not isinstance(error, BrokenOff)
            return Outcome(None, fault=_told(located, error, short=True), is_row=is_row)
        told = _told(located, error)
        stop = "" if told[-1] in ".?" else "."
        raise DataError(f"{told}{stop} To leave such rows out, type dataset.skip_bad_rows=true.") from None


def _told(located: Located, error: DataError, *, short: bool = False) -> str:
    source = PurePath(located.source).name if short else located.source
    row = "" if isinstance(located.row, DataError) else f"row {located.number}: "  # else the message has the line
    return f"{source}, {row}{error}"


def _about_first_line(located: Located) -> str:
    is_table = PurePath(located.source).suffix.lower() in (".csv", ".tsv")
    return " The first line of the file is read as the names of its columns." if is_table else ""
