"""Preference rows: a prompt with a better and a worse answer, or with one answer and whether it is good."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.data.columns import LIKELY, require, suggest, text_of
from llama_lab.data.turns import ROLES, check_text, turns_of
from llama_lab.dataset_config import EMBEDDED_DATASETS, DatasetSettings
from llama_lab.errors import DataError, did_you_mean
from llama_lab.own_settings import FROM_PAIRS, SAMPLING

Turns = list[dict[str, str]]

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
"""How a turn begins in Anthropic's dialogues (arXiv 2204.05862), which are one text each."""
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

VERDICTS = {"true": True, "false": False}
"""A table of text has no other way to write them."""


def check_trainer(form: DataFormat, trainer: TrainerName, row: dict[str, Any], dataset: DatasetSettings) -> None:
    """Refuse to learn preference rows as if every answer were a good one, and rows of one answer as if there were two.

    Raises:
        DataError: says how the good answers alone are learned, or which trainer the rows are for.
    """
    columns = dataset.columns
    if form is DataFormat.prompt and trainer not in SAMPLING:
        raise DataError(
            f"the columns {', '.join(map(str, row))} fit no format of trainer={trainer}: there is a prompt and no "
            f"answer. Prompts alone are for trainer=grpo and rloo.{suggest(row)}"
        )
    if trainer in FROM_PAIRS:
        _check_preferences(form, trainer, dataset)
        return
    if trainer in SAMPLING:
        _check_prompts(form, trainer, row, dataset)
        return
    if form is DataFormat.preference:
        whole = isinstance(row.get(columns.chosen), list)
        words = f"messages dataset.columns.messages={columns.chosen}" if whole else _good_answers(dataset)
        raise DataError(
            f"the rows are preferences ({columns.chosen}, {columns.rejected}), and trainer=sft learns one answer "
            f"a prompt. Type dataset.format={words} for the chosen ones."
        )
    if form is DataFormat.unpaired_preference:
        raise DataError(
            f"the rows say of each answer whether it is good ({columns.label}), and trainer=sft learns every one. Type "
            "dataset.format=prompt_completion for all of them."
        )


def _check_preferences(form: DataFormat, trainer: TrainerName, dataset: DatasetSettings) -> None:
    if form is DataFormat.preference or (form is DataFormat.unpaired_preference and trainer is TrainerName.kto):
        return
    if form is DataFormat.unpaired_preference:
        raise DataError(
            f"the rows say of each answer whether it is good ({dataset.columns.label}), and trainer={trainer} compares "
            "two answers to one prompt. Type trainer=kto."
        )
    words = (
        "dataset=sample_preference" if dataset.name in EMBEDDED_DATASETS else "dataset.columns.chosen=COLUMN and so on"
    )
    raise DataError(
        f"the rows have one answer a prompt (format {form}), and trainer={trainer} learns which of two is better, from "
        f"columns prompt, chosen, rejected. Type trainer=sft, or {words}."
    )


def _check_prompts(form: DataFormat, trainer: TrainerName, row: dict[str, Any], dataset: DatasetSettings) -> None:
    answers = next((name for name in row if str(name).lower() in LIKELY["completion"]), None)
    if form is DataFormat.prompt and dataset.format is DataFormat.auto and answers is not None:
        raise DataError(
            f"the rows have a column {answers} beside {dataset.columns.prompt}. Type dataset.columns.completion="
            f"{answers} where it holds answers that rewards may compare with, or dataset.format=prompt where not."
        )
    if form in (DataFormat.text, DataFormat.preference, DataFormat.unpaired_preference):
        instead = "dataset=sample_rewards" if form is DataFormat.text else "trainer=dpo, or dataset=sample_rewards"
        raise DataError(
            f"the rows have the format {form}, and trainer={trainer} answers prompts itself; trainer.rewards may "
            f"compare with the one answer of a row. Type {instead}."
        )


def _good_answers(dataset: DatasetSettings) -> str:
    return f"prompt_completion dataset.columns.completion={dataset.columns.chosen}"


def from_preference(row: dict[str, Any], dataset: DatasetSettings) -> dict[str, Any]:
    """{"prompt", "chosen", "rejected"} as lists of messages.

    Each of the three columns holds a text or messages. Where chosen and rejected are whole conversations (as messages,
    or as one text of "Human:" and "Assistant:" without a column prompt), the prompt is what both begin with, up to the
    last turn before an answer.

    Raises:
        DataError: a column is missing or empty, both answers are the same, or the conversations share no beginning.
    """
    answer = _answer if dataset.columns.prompt in row else _dialogue_or_answer
    chosen, rejected = (answer(row, column, dataset) for column in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(
            f"columns {dataset.columns.chosen} and {dataset.columns.rejected} hold the same, so neither is better"
        )
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return {"prompt": prompt_of(row, dataset), "chosen": chosen, "rejected": rejected}
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise DataError(
            f"columns {dataset.columns.chosen} and {dataset.columns.rejected} hold conversations that do not begin "
            "with the same prompt"
        )
    example = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    for name in ("chosen", "rejected"):
        if example[name][0]["role"] != "assistant" or example[name][-1]["role"] != "assistant":
            raise DataError(f"column {getattr(dataset.columns, name)} does not go on with an answer after the prompt")
    return example


def from_unpaired_preference(row: dict[str, Any], dataset: DatasetSettings) -> dict[str, Any]:
    """{"prompt", "completion", "label"}: messages, messages, and whether the completion is good.

    Raises:
        DataError: a column is missing or empty, or the label is neither true nor false.
    """
    label = require(row, "label", dataset)
    if not is_verdict(label):
        raise DataError(
            f"column {dataset.columns.label} holds {label!r:.40}; it is true for a good answer and false for a bad one"
        )
    label = VERDICTS[label.strip().lower()] if isinstance(label, str) else label
    return {"prompt": prompt_of(row, dataset), "completion": _answer(row, "completion", dataset), "label": label}


def is_verdict(value: Any) -> bool:
    """Whether a label says good or bad; in a table it is a text."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in VERDICTS)


def prompt_of(row: dict[str, Any], dataset: DatasetSettings) -> Turns:
    """The prompt of a row, a text or messages that end with a question.

    Raises:
        DataError: there is none, or it ends with an answer.
    """
    if not isinstance(require(row, "prompt", dataset), list):
        return [{"role": "user", "content": text_of(row, "prompt", dataset)}]
    turns = _turns(row, "prompt", dataset)
    if turns[-1]["role"] != "user":
        raise DataError(f"column {dataset.columns.prompt} does not end with a turn of user")
    return turns


def _answer(row: dict[str, Any], column: str, dataset: DatasetSettings) -> Turns:
    if not isinstance(require(row, column, dataset), list):
        return [{"role": "assistant", "content": text_of(row, column, dataset)}]
    return _turns(row, column, dataset)


def _dialogue_or_answer(row: dict[str, Any], column: str, dataset: DatasetSettings) -> Turns:
    text = require(row, column, dataset)
    if not isinstance(text, str) or not HH_TURN.match(text):
        return _answer(row, column, dataset)
    _, *parts = HH_TURN.split(text)
    turns = [
        {"role": HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    name = getattr(dataset.columns, column)
    for number, turn in enumerate(turns):
        check_text(turn["content"], f"turn {number + 1} of {name}")
        if turn["role"] != ("user", "assistant")[number % 2]:
            raise DataError(f"turn {number + 1} of column {name} follows another of {turn['role']}")
    return turns


def _turns(row: dict[str, Any], column: str, dataset: DatasetSettings) -> Turns:
    turns = turns_of(require(row, column, dataset), column, dataset)
    for turn in turns:
        if turn["role"] not in ROLES:
            raise DataError(f"a turn has the role '{turn['role']}'.{did_you_mean(turn['role'], ROLES)}")
    return turns
