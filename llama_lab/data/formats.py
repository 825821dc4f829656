"""What the columns of a row mean: every format becomes chat messages, or one text."""

import re
from typing import Any

from llama_lab.choices import DataFormat
from llama_lab.config import DatasetSettings
from llama_lab.errors import DataError, did_you_mean

COLUMNS = {
    DataFormat.messages: ("messages",),
    DataFormat.sharegpt: ("conversations",),
    DataFormat.prompt_completion: ("prompt", "completion"),
    DataFormat.alpaca: ("instruction", "output"),
    DataFormat.quotes: ("quote", "author"),
    DataFormat.guanaco: ("text",),
    DataFormat.text: ("text",),
}
"""The columns each format needs, in the order in which formats are tried."""

LIKELY = {
    "prompt": ("question", "query", "request", "input", "source", "problem", "user"),
    "completion": ("answer", "response", "output", "reply", "target", "solution", "assistant"),
    "text": ("content", "document", "body"),
    "messages": ("chat", "conversation", "dialog", "dialogue", "turns"),
}
"""What other people call these columns; used for suggestions only."""

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
GUANACO_TURN = re.compile(r"### (Human|Assistant):\s?")


def detect_format(row: dict[str, Any], dataset: DatasetSettings) -> DataFormat:
    """The format of a data set from one of its rows; a format that was asked for is only checked.

    Raises:
        DataError: no format fits the columns; names the nearest column and the word that maps it.
    """
    if dataset.format is not DataFormat.auto:
        for column in COLUMNS[dataset.format]:
            _require(row, column, dataset)
        return dataset.format
    for form, columns in COLUMNS.items():
        if all(getattr(dataset.columns, column) in row for column in columns):
            if form is DataFormat.guanaco and not str(row[dataset.columns.text]).startswith("### Human:"):
                continue
            return form
    raise DataError(f"the columns {', '.join(map(str, row))} fit no format.{_suggest(row)}")


def to_example(row: dict[str, Any], form: DataFormat, dataset: DatasetSettings) -> dict[str, Any]:
    """One row as {"messages": [{"role", "content"}, ...]} that ends with an answer, or as {"text": str}.

    Raises:
        DataError: a column is missing, empty or of the wrong type, or the roles do not alternate.
    """
    if form is DataFormat.text:
        return {"text": _text(row, "text", dataset)}
    messages = _MESSAGES_OF[form](row, dataset)
    if dataset.system_prompt and [m["role"] for m in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": dataset.system_prompt}, *messages]
    _check_turns(messages)
    return {"messages": messages}


def _from_messages(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    return _turns(row, "messages", "role", "content", dataset)


def _from_sharegpt(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    turns = _turns(row, "conversations", "from", "value", dataset)
    for turn in turns:
        if turn["role"] not in SHAREGPT_ROLES:
            hint = did_you_mean(turn["role"], SHAREGPT_ROLES)
            raise DataError(f"a turn is from '{turn['role']}'; known are {', '.join(SHAREGPT_ROLES)}.{hint}")
        turn["role"] = SHAREGPT_ROLES[turn["role"]]
    return turns


def _from_prompt_completion(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    return _ask(_text(row, "prompt", dataset), _text(row, "completion", dataset))


def _from_alpaca(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    request = _text(row, "instruction", dataset)
    context = row.get(dataset.columns.input)
    if isinstance(context, str) and context.strip():
        request = f"{request}\n\n{context}"
    return _ask(request, _text(row, "output", dataset))


def _from_quotes(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    return _ask(f"Give me a quote by {_text(row, 'author', dataset)}.", _text(row, "quote", dataset))


def _from_guanaco(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    # re.split with one group gives: text before the first turn, role, text, role, text, ...
    _, *parts = GUANACO_TURN.split(_text(row, "text", dataset))
    if not parts:
        raise DataError(f"column {dataset.columns.text} has no turn that begins '### Human:'. Type dataset.format=text")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[::2], parts[1::2], strict=True)]
    while turns and turns[-1]["role"] == "user":
        turns.pop()  # a conversation may break off at a question; there is nothing to learn from it
    return turns


_MESSAGES_OF = {
    DataFormat.messages: _from_messages,
    DataFormat.sharegpt: _from_sharegpt,
    DataFormat.prompt_completion: _from_prompt_completion,
    DataFormat.alpaca: _from_alpaca,
    DataFormat.quotes: _from_quotes,
    DataFormat.guanaco: _from_guanaco,
}


def _ask(request: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _turns(row: dict[str, Any], column: str, role: str, content: str, dataset: DatasetSettings) -> list[dict[str, str]]:
    turns = _require(row, column, dataset)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"column {column} is no list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(content), str):
            is_sharegpt = column == "messages" and isinstance(turn, dict) and {"from", "value"} <= turn.keys()
            name = dataset.columns.messages
            hint = f". Type dataset.format=sharegpt dataset.columns.conversations={name}" if is_sharegpt else ""
            raise DataError(f'a turn of {column} is not {{"{role}": "...", "{content}": "..."}}{hint}')
        _check_text(turn[content], f"a turn of {turn[role]}")
    return [{"role": turn[role], "content": turn[content]} for turn in turns]


def _text(row: dict[str, Any], column: str, dataset: DatasetSettings) -> str:
    value = _require(row, column, dataset)
    if not isinstance(value, str):
        raise DataError(f"column {getattr(dataset.columns, column)} holds {type(value).__name__} where text is needed")
    _check_text(value, f"column {getattr(dataset.columns, column)}")
    return value


def _check_text(text: str, where: str) -> None:
    if not text.strip():
        raise DataError(f"{where} is empty; fill it, or leave the row out")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell what no tokenizer reads
        raise DataError(f"{where} holds half of a surrogate pair, such as \\ud800; leave it out") from None


def _require(row: dict[str, Any], column: str, dataset: DatasetSettings) -> Any:
    name = getattr(dataset.columns, column)
    if name not in row:
        names = [str(key) for key in row]
        candidates = [other for other in names if other not in _taken(column, dataset)]
        known = next((c for c in LIKELY.get(column, ()) if c in candidates), None)
        hint = f" Did you mean dataset.columns.{column}={known}?" if known else None
        hint = hint or did_you_mean(name, candidates, f"dataset.columns.{column}={{}}")
        raise DataError(f"there is no column {name}; the columns are {', '.join(names)}.{hint}")
    return row[name]


def _taken(column: str, dataset: DatasetSettings) -> set[str]:
    """What the other columns of the same format are called."""
    others = {other for columns in COLUMNS.values() if column in columns for other in columns} - {column}
    return {getattr(dataset.columns, other) for other in others}


def _suggest(row: dict[str, Any]) -> str:
    lower = {str(key).lower(): str(key) for key in row}
    words = []
    for column in ("prompt", "completion"):
        found = next((lower[name] for name in (column, *LIKELY[column]) if name in lower), None)
        if found:
            words.append(f"dataset.columns.{column}={found}")
    if len(words) == 2:
        return f" Type {' '.join(words)}"
    return " Name them: dataset.columns.prompt=... dataset.columns.completion=... (or .text, .messages)"


def _check_turns(messages: list[dict[str, str]]) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if turns != expected or not turns or turns[-1] != "assistant":
        raise DataError(
            "the turns must go user, assistant, ..., and end with an answer, after one system turn at most; "
            f"here: {', '.join(roles) or 'none'}. Roles are user, assistant and system"
        )
