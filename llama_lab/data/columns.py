"""Which columns every format needs, and how a file that calls them otherwise is mapped."""

from __future__ import annotations

from typing import Any

from llama_lab.choices import DataFormat
from llama_lab.data.turns import check_text
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError, did_you_mean

COLUMNS = {
    DataFormat.messages: ("messages",),
    DataFormat.sharegpt: ("conversations",),
    DataFormat.preference: ("chosen", "rejected"),
    DataFormat.unpaired_preference: ("prompt", "completion", "label"),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.quotes: ("quote", "author"),
    DataFormat.guanaco: ("text",),
    DataFormat.text: ("text",),
    DataFormat.prompt: ("prompt",),  # last: a column prompt may stand beside an answer
}
"""The columns each format needs, in the order in which formats are tried."""

LIKELY = {
    "prompt": ("question", "query", "request", "input", "source", "problem", "user"),
    "completion": ("answer", "response", "output", "reply", "target", "solution", "assistant"),
    "text": ("content", "document", "body"),
    "messages": ("chat", "conversation", "dialog", "dialogue", "turns"),
    "chosen": ("accepted", "preferred", "better", "winner"),
    "rejected": ("refused", "dispreferred", "worse", "loser"),
}
"""What other people call these columns; used for suggestions only."""


def require(row: dict[str, Any], column: str, dataset: DatasetSettings) -> Any:
    """The value of one of our columns.

    Raises:
        DataError: the row has no such column; names the one that was probably meant and the word that maps it.
    """
    name = getattr(dataset.columns, column)
    if name not in row:
        names = [str(key) for key in row]
        candidates = [other for other in names if other not in _taken(column, dataset)]
        known = next((c for c in LIKELY.get(column, ()) if c in candidates), None)
        hint = f" Did you mean dataset.columns.{column}={known}?" if known else None
        hint = hint or did_you_mean(name, candidates, f"dataset.columns.{column}={{}}")
        raise DataError(f"there is no column {name}; the columns are {', '.join(names) or 'none'}.{hint}")
    return row[name]


def text_of(row: dict[str, Any], column: str, dataset: DatasetSettings) -> str:
    """The text in one of our columns.

    Raises:
        DataError: the column is missing, or holds no text, or only white space.
    """
    value, name = require(row, column, dataset), getattr(dataset.columns, column)
    if not isinstance(value, str):
        held = "null" if value is None else type(value).__name__
        raise DataError(f"column {name} holds {held} where text is needed")
    check_text(value, f"column {name}")
    return value


def suggest(row: dict[str, Any]) -> str:
    """The words that map columns which fit no format, where their names tell what they hold."""
    lower = {str(key).lower(): str(key) for key in row}
    words = []
    for pair in (("prompt", "completion"), ("chosen", "rejected")):
        for column in pair:
            found = next((lower[name] for name in (column, *LIKELY[column]) if name in lower), None)
            if found:
                words.append(f"dataset.columns.{column}={found}")
        if len(words) == 2:
            return f" Type {' '.join(words)}"
        words = []
    return " Name them: dataset.columns.prompt=... dataset.columns.completion=... (or .text, .messages)"


def _taken(column: str, dataset: DatasetSettings) -> set[str]:
    """What the other columns of the same format are called."""
    others = {other for columns in COLUMNS.values() if column in columns for other in columns} - {column}
    return {getattr(dataset.columns, other) for other in others}
