"""Rows of JSON and JSONL files of any size: one row at a time is in memory, and every fault is told by its place."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_lab.errors import DataError

Row = dict[str, Any] | DataError
"""A row as the file has it, or why it cannot be read, though others can; the message lacks the file's name."""

CHUNK = 2**20
"""Bytes that are read at once."""

NO_OBJECT = 'is no JSON object. A row reads {"prompt": "...", "completion": "..."}.'
NO_LIST = (
    "holds no list of rows. It must be a list of objects, or an object with a list `data`; "
    "if every line is a row of its own, name it .jsonl."
)
TOO_DEEP = "is nested too deeply to be a row."
TOO_LONG = "holds a number of more than 4300 digits, which Python does not read. Write it as a text."

_SPACE = re.compile(r"[ \t\r\n]*")


class BrokenOff(DataError):
    """No row: here a file ends too early, or goes on in a way that cannot be read; what was dropped is told."""


class _NotAllowed(ValueError):
    """What Python's reader lets pass, and a row must not hold."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotAllowed(f"has the key {twice} twice. Leave one of them out.")
    return found


def _no_number(word: str) -> None:
    raise _NotAllowed(f"holds {word}, which JSON does not know. Write null, or leave the key out.")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
_PLAIN = json.JSONDecoder()


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a file with one JSON object a line; blank lines are passed by.

    Raises:
        DataError: the file is a JSON list.
        UnicodeDecodeError: see `readers.read_rows`.
    """
    with path.open(encoding="utf-8-sig") as lines:
        if lines.read(CHUNK).lstrip().startswith("["):
            raise DataError("line 1 begins a list, and every line is to be one row. Name the file .json.")
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_line(line, f"line {number}")


def _parse_line(line: str, where: str) -> Row:
    try:
        row = _STRICT.decode(line.strip())
    except _NotAllowed as error:
        return DataError(f"{where} {error}")
    except RecursionError:
        return DataError(f"{where} {TOO_DEEP}")
    except json.JSONDecodeError as error:
        if "\0" in line:
            return DataError(f"{where} holds NUL bytes: it was not written whole, or is no text. Write it again.")
        if not line.endswith("\n") and _may_go_on(error, line):
            return DataError(f"{where}, the last one, breaks off after {len(line)} characters. Write the file again.")
        return DataError(f"{where} is not JSON: {error.msg} (column {error.colno}).")
    except ValueError:
        return DataError(f"{where} {TOO_LONG}")
    return row if isinstance(row, dict) else DataError(f"{where} {NO_OBJECT}")


def read_json(path: Path) -> Iterator[Row]:
    """The rows of one JSON list of objects, or of the list `data` of an object; the file is never in memory as a whole.

    A file that breaks off, or is malformed in the middle, ends with a BrokenOff in the place of a row.

    Raises:
        DataError: there is no list of rows.
        UnicodeDecodeError: see `readers.read_rows`.
    """
    with path.open("rb") as file:
        text = _Text(file)
        if not text.next_sign():
            return
        number = 1
        try:
            is_whole_file = _enter_list(text)
            for row in _elements(text):
                yield row
                number += 1
            if is_whole_file and text.next_sign():
                raise json.JSONDecodeError("the list has ended, and more follows", text.text, text.pos)
        except json.JSONDecodeError as error:
            yield BrokenOff(_broken(text, error, number))
        except RecursionError:
            yield BrokenOff(f"row {number} {TOO_DEEP} What follows is not read.")
        except UnicodeDecodeError:
            raise
        except ValueError:
            yield BrokenOff(f"row {number} {TOO_LONG} What follows is not read.")


def _broken(text: _Text, error: json.JSONDecodeError, number: int) -> str:
    """Where a list breaks off or is malformed, and what is whole before that."""
    rows = "row before it is" if number == 2 else "rows before it are"
    whole = f"The {number - 1} {rows} whole" if number > 1 else "No row before it is whole"
    if text.ended and _may_go_on(error, text.text):
        begin, end = text.offset(text.pos), text.num_bytes
        return f"row {number} begins at byte {begin:,} and breaks off at byte {end:,}, the end of the file. {whole}."
    return f"{text.line_of(error.pos)} is not JSON: {error.msg}. {whole}; what follows is not read."


def _enter_list(text: _Text) -> bool:
    """Go to the first row of the list; whether the list is the whole file."""
    sign = text.next_sign()
    if sign == "[":
        text.pos += 1
        return True
    while sign in ("{", ","):  # an object: look for its key `data`
        text.pos += 1
        if text.next_sign() != '"':
            break
        key = text.value(_PLAIN)
        if text.next_sign() != ":":
            break
        text.pos += 1
        if text.next_sign() == "[" and key == "data":
            text.pos += 1
            return False
        text.value(_PLAIN)
        sign = text.next_sign()
    raise DataError(NO_LIST)


def _elements(text: _Text) -> Iterator[Row]:
    """The elements of a list up to and with its closing bracket."""
    if text.next_sign() == "]":
        text.pos += 1
        return
    while True:
        text.next_sign()
        try:
            row = text.value(_STRICT)
        except _NotAllowed as error:
            place = text.line_of(text.pos)
            text.value(_PLAIN)
            yield DataError(f"{place} {error}")
        else:
            yield row if isinstance(row, dict) else DataError(f"{text.line_of(text.pos)} {NO_OBJECT}")
        sign = text.next_sign()
        if sign not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text.text, text.pos)
        text.pos += 1
        if sign == "]":
            return


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the fault may only be that the text ends too early: a word such as -Infinity has nine letters."""
    return error.msg.startswith("Unterminated string") or error.pos + 10 > len(text.rstrip())


class _Text:
    """The part of a file's text that is being parsed."""

    def __init__(self, file: Any) -> None:
        self.text, self.pos, self.ended = "", 0, False
        self.num_bytes = 0  # read so far
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._line, self._num_torn = 1, 0

    def value(self, decoder: json.JSONDecoder) -> Any:
        """Parse the value at `pos` and go behind it; the text grows until the value is in it as a whole."""
        while True:
            try:
                found, end = decoder.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                if _may_go_on(error, self.text) and self._grow():
                    continue
                raise
            if end == len(self.text) and isinstance(found, int | float) and self._grow():
                continue  # more digits may follow
            self.pos = end
            return found

    def next_sign(self) -> str:
        """Go to the next character that is no white space; empty at the end of the file."""
        while True:
            self.pos = _SPACE.match(self.text, self.pos).end()  # type: ignore[union-attr]
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self._grow():
                return ""

    def line_of(self, pos: int) -> str:
        """The line of a place in the text, for messages."""
        return f"line {self._line + self.text.count(chr(10), 0, pos)}"

    def offset(self, pos: int) -> int:
        """The byte of the file at which a place in the text lies."""
        return self.num_bytes - self._num_torn - len(self.text[pos:].encode())

    def _grow(self) -> bool:
        """Drop what has been parsed, and read on: twice as much where one value fills the text, so time is linear."""
        if self.ended:
            return False
        data = self._file.read(max(CHUNK, len(self.text) - self.pos))
        self.ended = not data
        self.num_bytes += len(data)
        self._line += self.text.count("\n", 0, self.pos)
        self.text, self.pos = self.text[self.pos :] + self._decoder.decode(data), 0
        self._num_torn = len(self._decoder.getstate()[0])  # the last character of a file may be cut off
        return True
