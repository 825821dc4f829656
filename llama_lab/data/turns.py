"""The turns of a conversation: read from a row, and checked to go user, assistant, user, assistant."""

from __future__ import annotations

from typing import Any

from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError, did_you_mean

ROLES = ("user", "assistant", "system")

KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""What a turn holds, by our name of the column."""

OTHER_KEYS = {
    "messages": ("from", "value", "dataset.format=sharegpt dataset.columns.conversations={}"),
    "conversations": ("role", "content", "dataset.format=messages dataset.columns.messages={}"),
}
"""What a turn of the other kind holds, and the words that say so."""


def ask(request: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer."""
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def turns_of(turns: Any, column: str, dataset: DatasetSettings) -> list[dict[str, str]]:
    """The turns in a column as {"role", "content"}, whatever their keys are called.

    Args:
        column: our name of it, `messages` or `conversations` for a column that holds nothing else.
    Raises:
        DataError: it is no list, or a turn is not two texts.
    """
    role, content = KEYS.get(column, KEYS["messages"])
    name = getattr(dataset.columns, column)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"column {name} is no list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(content), str):
            raise DataError(
                f'a turn of {name} is not {{"{role}": "...", "{content}": "..."}}{_hint(turn, column, name)}'
            )
        check_text(turn[content], f"a turn of {turn[role]}")
    return [{"role": turn[role], "content": turn[content]} for turn in turns]


def _hint(turn: Any, column: str, name: str) -> str:
    if column not in OTHER_KEYS or not isinstance(turn, dict):
        return ""
    role, content, words = OTHER_KEYS[column]
    return f". Type {words.format(name)}" if {role, content} <= turn.keys() else ""


def trimmed(messages: list[dict[str, str]], *, also_first: bool) -> list[dict[str, str]]:
    """A conversation that has an answer, without questions behind its last one, which teach nothing.

    Args:
        also_first: leave out an answer that comes before any question, too. Long conversations of ShareGPT are cut into
            several rows, and those after the first begin with one.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return messages
    end = len(roles) - roles[::-1].index("assistant")
    num_system = int(roles[:1] == ["system"])
    first = num_system + (also_first and roles[num_system : num_system + 1] == ["assistant"])
    kept = messages[:num_system] + messages[first:end]
    return kept if "assistant" in roles[first:end] else messages


def check_turns(messages: list[dict[str, str]]) -> None:
    """Refuse a conversation that no chat template can render.

    Raises:
        DataError: says which turn is in the wrong place.
    """
    roles = [message["role"] for message in messages]
    unknown = next((role for role in roles if role not in ROLES), None)
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if unknown is None and turns == expected and turns and turns[-1] == "assistant":
        return
    if unknown is not None:
        said = f"a turn has the role '{unknown}'.{did_you_mean(unknown, ROLES)}"
    elif "assistant" not in turns:
        said = "no turn is an answer."
    else:
        wrong = next((i for i, (role, wanted) in enumerate(zip(turns, expected, strict=True)) if role != wanted), 0)
        said = f"turn {wrong + 1 + len(roles) - len(turns)} is in the wrong place."
    listed = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    raise DataError(
        f"{said} The turns must go user, assistant, ..., and end with an answer, after one system turn at most; "
        f"here: {listed}. Roles are {', '.join(ROLES)}"
    )


def is_blank(value: Any) -> bool:
    """Whether a value of a row says nothing: null, white space, or turns without a text."""
    if isinstance(value, list):
        return all(isinstance(turn, dict) and _has_blank_text(turn) for turn in value)
    return value is None or (isinstance(value, str) and not value.strip())


def _has_blank_text(turn: dict[str, Any]) -> bool:
    texts = [turn[key] for key in ("content", "value") if key in turn]
    return bool(texts) and all(isinstance(text, str) and not text.strip() for text in texts)


def check_text(text: str, where: str) -> None:
    """Refuse a text that is empty, or that no tokenizer reads."""
    if not text.strip():
        raise DataError(f"{where} is empty; fill it, or leave the row out")
    if half_character(text) is not None:
        raise DataError(f"{where} holds half of a surrogate pair, such as \\ud800; leave it out")


def half_character(text: str) -> int | None:
    """The first place, from 0, of half a surrogate pair, which JSON can spell and a word of the command line can hold;
    None where the text has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
