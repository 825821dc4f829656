"""What the columns of a row mean: every format becomes chat messages, one text, or a preference between answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llama_lab.choices import DataFormat
from llama_lab.data.columns import COLUMNS, require, suggest, text_of
from llama_lab.data.preference import from_preference, from_unpaired_preference, is_verdict, prompt_of
from llama_lab.data.turns import ask, check_turns, is_blank, trimmed, turns_of
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError, did_you_mean

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}
GUANACO_TURN = re.compile(r"### (Human|Assistant):\s?")


def detect_format(row: dict[str, Any], dataset: DatasetSettings, more: Sequence[dict[str, Any]] = ()) -> DataFormat:
    """The format of a data set from one of its rows; a format that was asked for is only checked.

    Args:
        more: further rows, where one alone might mislead: a column `text` holds Guanaco's conversations if half of the
            rows look like it.
    Raises:
        DataError: no format fits the columns; names the nearest column and the word that maps it.
    """
    if dataset.format is not DataFormat.auto:
        for column in COLUMNS[dataset.format]:
            require(row, column, dataset)
        return dataset.format
    for form, columns in COLUMNS.items():
        if all(getattr(dataset.columns, column) in row for column in columns) and _fits([row, *more], form, dataset):
            return form
    raise DataError(f"the columns {', '.join(map(str, row))} fit no format.{suggest(row)}")


def _fits(rows: list[dict[str, Any]], form: DataFormat, dataset: DatasetSettings) -> bool:
    """Whether most rows hold what the format needs, where the names of its columns do not tell it from another."""
    if form is DataFormat.guanaco:
        found = [str(row.get(dataset.columns.text)).lstrip().startswith("### Human:") for row in rows]
    elif form is DataFormat.unpaired_preference:
        found = [is_verdict(row.get(dataset.columns.label)) for row in rows]
    else:
        return True
    return 2 * sum(found) >= len(found)


def convert(row: dict[str, Any], form: DataFormat, dataset: DatasetSettings) -> tuple[dict[str, Any], bool]:
    """One row as what it means, and whether turns were left out: a question at the end that nobody answered, and of
    ShareGPT's and Guanaco's conversations also an answer at the beginning whose question is not there.

    {"messages": [{"role", "content"}, ...]} that ends with an answer, or {"text": str}; of preference rows {"prompt",
    "chosen", "rejected"} and {"prompt", "completion", "label"}, all but the label a list of messages; of a prompt
    alone {"prompt"}, a list of messages that ends with a question.

    Raises:
        DataError: a column is missing, empty or of the wrong type, or the roles do not alternate.
    """
    if form is DataFormat.text:
        return {"text": text_of(row, "text", dataset)}, False
    if form is DataFormat.preference:
        return _with_system(from_preference(row, dataset), "prompt", dataset), False
    if form is DataFormat.unpaired_preference:
        return _with_system(from_unpaired_preference(row, dataset), "prompt", dataset), False
    if form is DataFormat.prompt:
        answer = dataset.columns.completion
        if dataset.format is DataFormat.auto and not is_blank(row.get(answer)):
            raise DataError(
                f"column {answer} holds an answer, and the first row has none. Type dataset.format=prompt to take the "
                "prompts of all rows alone, or give each row an answer"
            )
        return _with_system({"prompt": prompt_of(row, dataset)}, "prompt", dataset), False
    whole = _MESSAGES_OF[form](row, dataset)
    messages = trimmed(whole, also_first=form in (DataFormat.sharegpt, DataFormat.guanaco))
    check_turns(messages)
    return _with_system({"messages": messages}, "messages", dataset), len(messages) < len(whole)


def is_empty(row: dict[str, Any], form: DataFormat, dataset: DatasetSettings) -> bool:
    """Whether all columns of the format are there and say nothing: white space, null, or no turns."""
    names = [getattr(dataset.columns, column) for column in COLUMNS[form] if column != "label"]
    return all(name in row and is_blank(row[name]) for name in names)


def _with_system(example: dict[str, Any], key: str, dataset: DatasetSettings) -> dict[str, Any]:
    messages = example[key]
    if dataset.system_prompt and [m["role"] for m in messages[:1]] != ["system"]:
        example[key] = [{"role": "system", "content": dataset.system_prompt}, *messages]
    return example


def _from_messages(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    return turns_of(require(row, "messages", dataset), "messages", dataset)


def _from_sharegpt(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    turns = turns_of(require(row, "conversations", dataset), "conversations", dataset)
    for turn in turns:
        if turn["role"] not in SHAREGPT_ROLES:
            hint = did_you_mean(turn["role"], SHAREGPT_ROLES)
            raise DataError(f"a turn is from '{turn['role']}'; known are {', '.join(SHAREGPT_ROLES)}.{hint}")
        turn["role"] = SHAREGPT_ROLES[turn["role"]]
    return turns


def _from_prompt_completion(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    return ask(text_of(row, "prompt", dataset), text_of(row, "completion", dataset))


def _from_alpaca(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    request = text_of(row, "instruction", dataset)
    context = row.get(dataset.columns.input)
    if isinstance(context, str) and context.strip():
        request = f"{request}\n\n{context}"
    return ask(request, text_of(row, "output", dataset))


def _from_quotes(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    return ask(f"Give me a quote by {text_of(row, 'author', dataset)}.", text_of(row, "quote", dataset))


def _from_guanaco(row: dict[str, Any], dataset: DatasetSettings) -> list[dict[str, str]]:
    # OpenAssistant-guanaco: every turn begins "### Human: " or "### Assistant: ". One group in re.split gives the text
    # before the first turn, role, text, role, text, ...
    _, *parts = GUANACO_TURN.split(text_of(row, "text", dataset))
    if not parts:
        raise DataError(f"column {dataset.columns.text} has no turn that begins '### Human:'. Type dataset.format=text")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": GUANACO_ROLES[role], "content": content.strip()} for role, content in turns]


_MESSAGES_OF = {
    DataFormat.messages: _from_messages,
    DataFormat.sharegpt: _from_sharegpt,
    DataFormat.prompt_completion: _from_prompt_completion,
    DataFormat.alpaca: _from_alpaca,
    DataFormat.quotes: _from_quotes,
    DataFormat.guanaco: _from_guanaco,
}
